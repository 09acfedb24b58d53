// Kernels with activations as one float16 each.
#include "cuda/instances/decode.h"

namespace lb2::cuda {

Kernels kernels_float16(int token_tile) noexcept { return kernel_instances<SignHalves<1>>(token_tile); }

}  // namespace lb2::cuda
