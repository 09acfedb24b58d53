// Kernels with activations as 8-bit integers, a slice with a common scale.
#include "cuda/instances/decode.h"

namespace lb2::cuda {

Kernels kernels_int8(int token_tile) noexcept { return kernel_instances<BitPlanes<8>>(token_tile); }

}  // namespace lb2::cuda
