// Plans a CUDA call. Pure functions of the shape and the properties of the GPU, tested without a GPU.
#pragma once

#include "cuda/params.h"
#include "cuda/plan/layers.h"
#include "littlebit2/cuda.h"

namespace lb2::cuda {

constexpr int32_t kLeastChained = 90;  // capability with programmatic dependent launch
constexpr int64_t kMostSplits = 32;    // that the planner chooses

struct Plan : lb2_cuda_plan {  // launches for token_block tokens
  int64_t sum_parts;           // parts of the sums of the first of two stages, which the second adds
  // Bytes into the workspace: [sum_parts, tokens, rank] fp32 partial latents of each first stage, and the
  // converted slices of each term of a stage.
  int64_t sums_offset[LB2_MAX_PATHS];
  int64_t converted_offset[2][LB2_MAX_PATHS];
  // Of a normalized call: the norms of the tokens of a round, in the decode kernels; else all normalized
  // tokens, [m, k] fp32.
  int64_t normed_offset;
};

// Whether the launches of a plan whose device is set may start early.
inline bool is_chained(const lb2_cuda_plan& plan, const lb2_cuda_tuning& tuning) {
  return plan.device.capability >= kLeastChained && !tuning.unchained;
}

// Estimated cycles as a launch holds them.
inline int32_t cap_cycles(int64_t cycles) {
  return static_cast<int32_t>(cycles < INT32_MAX ? cycles : INT32_MAX);
}

// The device must have passed check_device; tuning may be NULL.
lb2_status make_plan(const CallShape& call, lb2_activation activation, const lb2_cuda_device& device,
                     const lb2_cuda_tuning* tuning, Plan* plan) noexcept;

// The same for a call whose arguments may be wrong. `normed`: see lb2_projections_plan_cuda.
LB2_API lb2_status plan_call(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m, lb2_dtype dtype,
                             lb2_activation activation, const lb2_cuda_device* device,
                             const lb2_cuda_tuning* tuning, bool normed, Plan* plan) noexcept;

// The whole plan of a call from an untrusted plan that lb2_grouped_plan_cuda should have made for it.
LB2_API lb2_status resume_plan(const CallShape& call, const lb2_cuda_plan* made, Plan* plan) noexcept;

// Whether the launches are those of the decode kernels.
LB2_API bool is_decode(const lb2_cuda_plan& plan) noexcept;

// Geometry and parameters of a launch for the tokens [first, first + tokens) of the call. `workspace` must be
// aligned. What was queued before decides `signs_early`: next_decode_launch (decode/plain_params.h) sets it.
LB2_API lb2_cuda_launch launch_for(const Plan& plan, int launch, int64_t tokens) noexcept;
LB2_API DecodeParams decode_params(const Layers& layers, const Plan& plan, int launch, int64_t first,
                                   int64_t tokens, char* workspace) noexcept;
LB2_API LaunchParams gemm_params(const Layers& layers, const Plan& plan, int launch, int64_t first,
                                 int64_t tokens, char* workspace) noexcept;

constexpr int64_t kWorkspaceAlignment = 256;

inline int64_t align_bytes(int64_t bytes) {
  return divide_up(bytes, kWorkspaceAlignment) * kWorkspaceAlignment;
}

// The first aligned byte of a workspace.
LB2_API char* align_workspace(void* workspace) noexcept;

}  // namespace lb2::cuda
