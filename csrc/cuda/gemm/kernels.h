// The compiled GEMM kernels, by activation mode and tile.
#pragma once

#include "cuda/gemm/sizes.h"

namespace lb2::cuda {

using GemmKernel = void (*)(const LaunchParams);

// Each is defined in its own file, so that they compile in parallel. rows = 0 is the conversion before the
// GEMM. NULL for a tile that has_gemm_tile does not have.
GemmKernel gemm_kernel_exact(int rows, int tokens) noexcept;
GemmKernel gemm_kernel_float16(int rows, int tokens) noexcept;
GemmKernel gemm_kernel_int8(int rows, int tokens) noexcept;

inline GemmKernel gemm_kernel_of(lb2_activation activation, int rows, int tokens) noexcept {
  switch (activation) {
    case LB2_ACTIVATION_EXACT:
      return gemm_kernel_exact(rows, tokens);
    case LB2_ACTIVATION_FLOAT16:
      return gemm_kernel_float16(rows, tokens);
    case LB2_ACTIVATION_INT8:
      return gemm_kernel_int8(rows, tokens);
    default:
      return nullptr;
  }
}

}  // namespace lb2::cuda
