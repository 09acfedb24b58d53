// Plans the fused kernel, which computes both stages in one launch. Pure functions, part of plan.h.
#pragma once

#include "cuda/fused/params.h"
#include "cuda/plan/plan.h"
#include "cuda/plan/work.h"

namespace lb2::cuda {

// Adds the launch to a plan whose device and activation are set, and sets token_block. Returns false, with
// the plan unchanged, if the latents of the layers do not fit on chip or tuning asks for other launches.
bool add_fused_launch(const Stages& stages, int64_t tokens, const lb2_cuda_tuning& tuning,
                      Plan* plan) noexcept;

// Whether the plan has this launch.
LB2_API bool is_fused(const lb2_cuda_plan& plan) noexcept;

// Parameters for the tokens [first, first + tokens) of the call, with that many blocks per cluster.
LB2_API FusedParams fused_params(const Layers& layers, const Plan& plan, int blocks, int64_t first,
                                 int64_t tokens) noexcept;

// Sets the fields of tuning that give made.launches again.
void read_fused_tuning(const lb2_cuda_plan& made, lb2_cuda_tuning* tuning) noexcept;

}  // namespace lb2::cuda
