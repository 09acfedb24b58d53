// Kernels with activations as signs, a slice with a common magnitude.
#include "cuda/instances/decode.h"

namespace lb2::cuda {

Kernels kernels_sign(int token_tile) noexcept { return kernel_instances<BitPlanes<2>>(token_tile); }

}  // namespace lb2::cuda
