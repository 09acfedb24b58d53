// The layers of a call: their shape, and their data in memory.
#pragma once

#include "cuda/plan/shape.h"

namespace lb2::cuda {

struct Layers {
  CallShape shape;
  const lb2_linear_args* args;           // [shape.num_layers]
  const lb2_path* paths[LB2_MAX_PATHS];  // of all layers
  const lb2_linear_args& front() const { return args[0]; }
};

// Checks the description of the layers (check_layer, and that they go together) and fills *layers, which
// points to args.
LB2_API lb2_status gather_layers(const lb2_linear_args* args, int64_t count, Layers* layers) noexcept;

// Checks data pointers and strides of a call on gathered layers.
LB2_API lb2_status check_data(const Layers& layers, int64_t workspace_bytes) noexcept;

}  // namespace lb2::cuda
