// Decode kernels with activations as one float16 each.
#include "cuda/decode_instances.h"

namespace lb2::cuda {

DecodeKernel decode_float16(int token_tile) noexcept { return decode_instance<SignHalves<1>>(token_tile); }

}  // namespace lb2::cuda
