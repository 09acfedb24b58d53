// The layers of one call: one, or several on the same input, whose paths then follow one another.
#pragma once

#include "core/first_stages.h"
#include "littlebit2/cuda.h"

namespace lb2::cuda {

struct Layers {
  const lb2_linear_args* args;  // [count]
  int32_t count;
  int32_t num_paths;
  bool single_stage;
  const lb2_path* paths[LB2_MAX_PATHS];   // of all layers
  int32_t first_path[LB2_MAX_PATHS + 1];  // of each layer, and the end
  const lb2_linear_args& front() const { return args[0]; }
};

// Checks what describes the layers (check_layer, and that they go together) and fills *layers, which points
// to args.
LB2_API lb2_status gather_layers(const lb2_linear_args* args, int64_t count, Layers* layers) noexcept;

// Checks data pointers and strides of a call, once gathered.
LB2_API lb2_status check_data(const Layers& layers, int64_t workspace_bytes) noexcept;

FirstStages find_first_stages(const Layers& layers) noexcept;

// Sign-accumulate operations of the call; INT64_MAX when there are more.
int64_t count_macs(const Layers& layers) noexcept;

}  // namespace lb2::cuda
