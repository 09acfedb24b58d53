// How a CUDA call is cut up: pure functions of the layer and the GPU's properties, tested without a GPU.
#pragma once

#include "core/first_stages.h"
#include "cuda/params.h"
#include "littlebit2/cuda.h"

namespace lb2::cuda {

struct Plan : lb2_cuda_plan {  // stages for token_block tokens, or fewer where there are fewer
  FirstStages first;
  int64_t sums_offset[LB2_MAX_PATHS];  // bytes: [grid_y, tokens, rank] fp32 partial latents of each group
};

// Whether the kernels can run on a GPU, and a message if not.
LB2_API lb2_status check_device(const lb2_cuda_device* device) noexcept;

// The arguments must have passed check_layer, and the device check_device; tuning may be NULL.
LB2_API lb2_status make_plan(const lb2_linear_args& args, lb2_activation activation,
                             const lb2_cuda_device& device, const lb2_cuda_tuning* tuning,
                             Plan* plan) noexcept;

// The whole plan of a call from what lb2_linear_plan_cuda gave for it, of which nothing is trusted. The
// arguments must have passed check_layer.
LB2_API lb2_status resume_plan(const lb2_linear_args& args, const lb2_cuda_plan* made, Plan* plan) noexcept;

// Launch geometry and parameters of one stage for the tokens [first, first + tokens) of the call; `workspace`
// is aligned.
LB2_API lb2_cuda_stage stage_launch(const Plan& plan, int stage, int64_t tokens) noexcept;
LB2_API StageParams stage_params(const lb2_linear_args& args, const Plan& plan, int stage, int64_t first,
                                 int64_t tokens, char* workspace) noexcept;

constexpr int64_t kWorkspaceAlignment = 256;

// The first aligned byte of a workspace.
LB2_API char* align_workspace(void* workspace) noexcept;

}  // namespace lb2::cuda
