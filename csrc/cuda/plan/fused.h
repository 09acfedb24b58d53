// Whether and how a call takes the kernel of both stages: pure functions, as plan.h, of which they are a
// part.
#pragma once

#include "cuda/fused/params.h"
#include "cuda/plan/plan.h"
#include "cuda/plan/work.h"

namespace lb2::cuda {

// Adds its launch to a plan that has its device, activation and first stages, and sets token_block; false,
// and nothing done, where the latents of the layers do not fit on chip, or tuning asks for other launches.
bool add_fused_launch(const Stages& stages, int64_t tokens, const lb2_cuda_tuning& tuning,
                      Plan* plan) noexcept;

// Whether this is that launch.
LB2_API bool is_fused(const lb2_cuda_plan& plan) noexcept;

// Parameters for the tokens [first, first + tokens) of the call, in clusters of as many blocks.
LB2_API FusedParams fused_params(const Layers& layers, const Plan& plan, int blocks, int64_t first,
                                 int64_t tokens) noexcept;

// What made.launches chose, to plan with again.
void read_fused_tuning(const lb2_cuda_plan& made, lb2_cuda_tuning* tuning) noexcept;

}  // namespace lb2::cuda
