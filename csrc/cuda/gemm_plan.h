// How a call that uses the GEMM is cut up: pure functions, as plan.h, of which they are a part.
#pragma once

#include "cuda/gemm_params.h"
#include "cuda/plan.h"

namespace lb2::cuda {

// Adds the launches to a plan that has its device, activation and first stages; sets token_block and
// workspace_bytes.
void add_gemm_launches(const Layers& layers, const lb2_cuda_tuning& tuning, Plan* plan) noexcept;

// Whether these are the launches of a GEMM.
LB2_API bool is_gemm(const lb2_cuda_plan& plan) noexcept;

// What made.launches chose, to plan with again.
void read_gemm_tuning(const lb2_cuda_plan& made, lb2_cuda_tuning* tuning) noexcept;

// As launch_params, of a launch of a GEMM.
LB2_API GemmParams gemm_params(const Layers& layers, const Plan& plan, int launch, int64_t first,
                               int64_t tokens, char* workspace) noexcept;

}  // namespace lb2::cuda
