// What a call of many tokens is expected to take, and what unpacking the layers and a library's matrix
// products would: pure functions, as plan.h.
#pragma once

#include "cuda/plan/plan.h"
#include "cuda/plan/work.h"

namespace lb2::cuda {

// Sets estimated_cycles and, but for float32, unpack_cycles of a plan that has its launches.
void estimate_call(const Stages& stages, int64_t tokens, lb2_dtype dtype, Plan* plan) noexcept;

}  // namespace lb2::cuda
