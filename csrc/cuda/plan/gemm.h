// Plans the GEMM. Pure functions, part of plan.h.
#pragma once

#include "cuda/gemm/sizes.h"
#include "cuda/plan/plan.h"
#include "cuda/plan/work.h"

namespace lb2::cuda {

// Adds the launches to a plan whose device and activation are set; sets token_block and workspace_bytes.
void add_gemm_launches(const Stages& stages, int64_t tokens, const lb2_cuda_tuning& tuning,
                       Plan* plan) noexcept;

// Used by the estimates of the GEMM and the fused kernel, to be replaced by measurements: cycles of the two
// dependent MMAs of a step, with their loads; bytes that all SMs together get from the L2 cache per cycle.
constexpr int64_t kStepLatency = 70;
constexpr int64_t kL2Bytes = 2500;
// Cycles of a block of the GEMM besides its products: until its first operands arrive, and storing its sums.
constexpr int64_t kGemmBlockCycles = 2500;
// Cycles per MMA of a quarter of an SM, by nominal rates: GeForce GPUs have a quarter of the rate of an A100
// for float16 with fp32 sums, and half for int8; on sm_90 mma.sync reaches two thirds of the rate of wgmma.
int64_t mma_cycles(lb2_activation activation, int32_t capability) noexcept;

// Whether the plan has the launches of a GEMM.
LB2_API bool is_gemm(const lb2_cuda_plan& plan) noexcept;

// Sets the fields of tuning that give made.launches again.
void read_gemm_tuning(const lb2_cuda_plan& made, lb2_cuda_tuning* tuning) noexcept;

}  // namespace lb2::cuda
