// The compiled fused kernels, by activation mode.
#pragma once

#include "cuda/fused/params.h"

namespace lb2::cuda {

using FusedKernel = void (*)(const FusedParams);

// Each is defined in its own file, so that they compile in parallel.
FusedKernel fused_kernel_exact() noexcept;
FusedKernel fused_kernel_float16() noexcept;
FusedKernel fused_kernel_int8() noexcept;

inline FusedKernel fused_kernel_of(lb2_activation activation) noexcept {
  switch (activation) {
    case LB2_ACTIVATION_EXACT:
      return fused_kernel_exact();
    case LB2_ACTIVATION_FLOAT16:
      return fused_kernel_float16();
    case LB2_ACTIVATION_INT8:
      return fused_kernel_int8();
    default:
      return nullptr;
  }
}

}  // namespace lb2::cuda
