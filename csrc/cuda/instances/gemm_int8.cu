// GEMMs with activations as 8-bit integers.
#include "cuda/instances/gemm.h"

namespace lb2::cuda {

GemmKernel gemm_kernel_int8(int rows, int tokens) noexcept { return gemm_instance<GemmInt8>(rows, tokens); }

}  // namespace lb2::cuda
