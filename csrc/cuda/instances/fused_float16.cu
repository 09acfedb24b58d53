// Both stages in one kernel, activations as one float16 number each.
#include "cuda/fused/fused.h"
#include "cuda/fused/kernels.h"

namespace lb2::cuda {

FusedKernel fused_kernel_float16() noexcept { return fused<GemmHalves<1>>; }

}  // namespace lb2::cuda
