// Plan of a call on the portable layout: blocks of tokens, shared first stages, and the workspace layout.
// Pure functions of the shape and the number of tokens.
#pragma once

#include "core/shape.h"

namespace lb2::cpu {

constexpr int64_t kMaxTokenBlock = 96;  // most tokens per block; bounds the tile buffers on the stack

// fp32 rows in the workspace, one per token of a block, padded to whole words of columns.
struct RowBuffer {
  int64_t offset;  // in floats from the start of the workspace
  int64_t stride;  // floats per token, a multiple of 32
};

struct Plan : FirstStages {
  int64_t token_block;
  RowBuffer inputs[LB2_MAX_PATHS];  // forward: x * in_scale per group; backward: grad_y * out_scale per path
  RowBuffer
      latents[LB2_MAX_PATHS];  // forward: one per path; backward: one per group; unused when single-stage
  int64_t workspace_bytes;
};

// The shape must have passed check_shape.
Plan plan_forward(const lb2_layer_shape& shape, int64_t m) noexcept;
Plan plan_backward(const lb2_layer_shape& shape, int64_t m) noexcept;

}  // namespace lb2::cpu
