// The layers of a call: their shape, and their data in memory.
#pragma once

#include "cuda/plan/shape.h"
#include "littlebit2/cuda.h"

namespace lb2::cuda {

// What is computed around the products of a call (params.h, Extras); all zero for nothing.
struct CallExtras {
  const lb2_norm* norm;
  const void*
      factor;  // [m, k] of the call's dtype, with which the input is multiplied; not together with norm
  int64_t factor_stride;
  lb2_function function;
  int32_t function_rows;
  const void* residual;
  int64_t residual_stride;
  bool after_own;  // the kernel before the call is one of ours, and wrote neither signs nor scales
};

struct Layers {
  CallShape shape;
  CallExtras extras;
  // Of the launches: that of args, or where a kernel of ours has left a normalized one.
  const void* input;
  int64_t input_stride;
  lb2_dtype input_dtype;
  const lb2_linear_args* args;           // [shape.num_layers]
  const lb2_path* paths[LB2_MAX_PATHS];  // of all layers
  const lb2_linear_args& front() const { return args[0]; }
};

// Checks the description of the layers (check_layer, and that they go together) and fills *layers, which
// points to args.
LB2_API lb2_status gather_layers(const lb2_linear_args* args, int64_t count, Layers* layers) noexcept;

// Checks extras of a call on gathered layers, and adds them.
LB2_API lb2_status add_extras(const lb2_cuda_extras& extras, Layers* layers) noexcept;

// Checks data pointers and strides of a call on gathered layers.
LB2_API lb2_status check_data(const Layers& layers, int64_t workspace_bytes) noexcept;

}  // namespace lb2::cuda
