// Estimated time of a call with many tokens, and of dequantizing the layers and calling a library's matrix
// products. Pure functions, like plan.h.
#pragma once

#include "cuda/plan/plan.h"
#include "cuda/plan/work.h"

namespace lb2::cuda {

// Sets estimated_cycles and, except in float32, unpack_cycles of a plan whose launches are set.
void estimate_call(const Stages& stages, int64_t tokens, lb2_dtype dtype, Plan* plan) noexcept;

}  // namespace lb2::cuda
