// How a call that uses the GEMM is cut up: pure functions, as plan.h, of which they are a part.
#pragma once

#include "cuda/gemm_sizes.h"
#include "cuda/plan.h"
#include "cuda/work.h"

namespace lb2::cuda {

// Adds the launches to a plan that has its device, activation and first stages; sets token_block and
// workspace_bytes.
void add_gemm_launches(const Stages& stages, int64_t tokens, const lb2_cuda_tuning& tuning,
                       Plan* plan) noexcept;

// Cycles of a quarter of an SM for one MMA. The rates of mma.sync: half of the tensor cores' for float16 sums
// in fp32 on GeForce GPUs, about 0.65 of them on sm_90, whose full rate only wgmma has.
int64_t mma_cycles(lb2_activation activation, int32_t capability) noexcept;

// Whether these are the launches of a GEMM.
LB2_API bool is_gemm(const lb2_cuda_plan& plan) noexcept;

// What made.launches chose, to plan with again.
void read_gemm_tuning(const lb2_cuda_plan& made, lb2_cuda_tuning* tuning) noexcept;

}  // namespace lb2::cuda
