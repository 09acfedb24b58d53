// Queues the launches of gathered calls.
#pragma once

#include "cuda/failure.h"
#include "cuda/plan/plan.h"

namespace lb2::cuda {

// Queues a call on the current GPU, all of whose data has been checked, and what its extras ask for.
// `workspace` is aligned, and holds what the plan says.
lb2_status queue_call(const Layers& layers, const Plan& plan, char* workspace, cudaStream_t stream) noexcept;

}  // namespace lb2::cuda
