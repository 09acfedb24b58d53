// Both stages in one kernel, activations as int8.
#include "cuda/fused/fused.h"
#include "cuda/fused/kernels.h"

namespace lb2::cuda {

FusedKernel fused_kernel_int8() noexcept { return fused<GemmInt8>; }

}  // namespace lb2::cuda
