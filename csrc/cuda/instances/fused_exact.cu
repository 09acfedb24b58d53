// Both stages in one kernel, activations as two float16 numbers each, of 22 bits.
#include "cuda/fused/fused.h"
#include "cuda/fused/kernels.h"

namespace lb2::cuda {

FusedKernel fused_kernel_exact() noexcept { return fused<GemmHalves<2>>; }

}  // namespace lb2::cuda
