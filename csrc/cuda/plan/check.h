// Checks of a CUDA call beyond core/check.h.
#pragma once

#include "littlebit2/cuda.h"

namespace lb2::cuda {

// Whether the kernels can run on a GPU.
LB2_API lb2_status check_device(const lb2_cuda_device* device) noexcept;

// Whether tuning sets fields that only a GEMM has, not the fused kernel.
bool asks_for_gemm(const lb2_cuda_tuning& tuning) noexcept;

// `most_splits`: the most splits of the first of two stages.
lb2_status check_tuning(const lb2_cuda_tuning& tuning, lb2_activation activation,
                        int64_t most_splits) noexcept;

lb2_status check_plan_struct(const lb2_cuda_plan* plan) noexcept;

// Sizes that the kernels' 32-bit arithmetic has room for; check_shape must have passed.
lb2_status check_sizes(const lb2_layer_shape& shape) noexcept;

// `index` is that of a path, or negative for an argument that is of no path.
lb2_status check_address(const char* name, int64_t index, const void* p, uintptr_t bytes) noexcept;

// Alignment of everything that kernels access in elements; a misaligned access would fault on the GPU.
LB2_API lb2_status check_addresses(const lb2_linear_args& args) noexcept;

}  // namespace lb2::cuda
