// Decode kernels with activations as 16-bit integers, a slice with a common scale.
#include "cuda/decode_instances.h"

namespace lb2::cuda {

DecodeKernel decode_int16(int token_tile) noexcept { return decode_instance<BitPlanes<16>>(token_tile); }

}  // namespace lb2::cuda
