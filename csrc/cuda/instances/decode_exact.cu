// Kernels with activations as two float16 each.
#include "cuda/instances/decode.h"

namespace lb2::cuda {

Kernels kernels_exact(int token_tile) noexcept { return kernel_instances<SignHalves<2>>(token_tile); }

}  // namespace lb2::cuda
