// Decode kernels with activations as signs, a slice with a common magnitude.
#include "cuda/decode_instances.h"

namespace lb2::cuda {

DecodeKernel decode_sign(int token_tile) noexcept { return decode_instance<BitPlanes<2>>(token_tile); }

}  // namespace lb2::cuda
