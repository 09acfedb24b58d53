// GEMMs with activations as one float16 each.
#include "cuda/instances/gemm.h"

namespace lb2::cuda {

GemmKernel gemm_kernel_float16(int rows, int tokens) noexcept {
  return gemm_instance<GemmHalves<1>>(rows, tokens);
}

}  // namespace lb2::cuda
