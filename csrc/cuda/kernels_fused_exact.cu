// Both stages in one kernel, activations as two float16 numbers each, of 22 bits.
#include "cuda/fused.h"
#include "cuda/fused_kernels.h"

namespace lb2::cuda {

FusedKernel fused_kernel_exact() noexcept { return fused<GemmHalves<2>>; }

}  // namespace lb2::cuda
