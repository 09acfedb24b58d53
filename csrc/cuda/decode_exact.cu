// Decode kernels with activations as two float16 each.
#include "cuda/decode_instances.h"

namespace lb2::cuda {

DecodeKernel decode_exact(int token_tile) noexcept { return decode_instance<SignHalves<2>>(token_tile); }

}  // namespace lb2::cuda
