// How a call that uses the GEMM is cut up: pure functions, as plan.h, of which they are a part.
#pragma once

#include "cuda/gemm/sizes.h"
#include "cuda/plan/plan.h"
#include "cuda/plan/work.h"

namespace lb2::cuda {

// Adds the launches to a plan that has its device, activation and first stages; sets token_block and
// workspace_bytes.
void add_gemm_launches(const Stages& stages, int64_t tokens, const lb2_cuda_tuning& tuning,
                       Plan* plan) noexcept;

// What estimates of the kernels of many tokens count with, to be replaced by measurements: cycles of the two
// dependent MMAs of a step, loading what they take included; bytes that all SMs get from the L2 cache in one.
constexpr int64_t kStepLatency = 70;
constexpr int64_t kL2Bytes = 2500;
// Cycles of a quarter of an SM for one MMA, by nominal rates: GeForce GPUs have a quarter of an A100's for
// float16 with sums in fp32, and half for int8; on sm_90 mma.sync has two thirds of the rate that wgmma has.
int64_t mma_cycles(lb2_activation activation, int32_t capability) noexcept;

// Whether these are the launches of a GEMM.
LB2_API bool is_gemm(const lb2_cuda_plan& plan) noexcept;

// What made.launches chose, to plan with again.
void read_gemm_tuning(const lb2_cuda_plan& made, lb2_cuda_tuning* tuning) noexcept;

}  // namespace lb2::cuda
