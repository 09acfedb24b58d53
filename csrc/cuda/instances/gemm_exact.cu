// GEMMs with activations as two float16 numbers each, of 22 bits.
#include "cuda/instances/gemm.h"

namespace lb2::cuda {

GemmKernel gemm_kernel_exact(int rows, int tokens) noexcept {
  return gemm_instance<GemmHalves<2>>(rows, tokens);
}

}  // namespace lb2::cuda
