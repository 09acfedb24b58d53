// The shape of a CUDA call: of one layer, or of several on the same input, whose paths then follow one
// another.
#pragma once

#include "core/shape.h"
#include "littlebit2/cuda.h"

namespace lb2::cuda {

struct CallShape {
  int64_t m, k;
  lb2_dtype dtype;
  int32_t num_layers, num_paths;
  bool single_stage;
  bool normed;                            // the input is normalized in the call
  int32_t first_path[LB2_MAX_PATHS + 1];  // of each layer, and the end
  int64_t n[LB2_MAX_PATHS];               // of each layer
  int64_t ranks[LB2_MAX_PATHS];           // of each path
  FirstStages first;                      // of all paths; those of different layers share none
  int64_t macs;                           // sign-accumulate operations; INT64_MAX if there are more
};

// Checks the number of layers, and starts a shape with none.
lb2_status start_shape(int64_t num_layers, int64_t m, lb2_dtype dtype, CallShape* call) noexcept;

// Adds a layer whose shape check_shape passed, or says why it does not go with those before. `list` names the
// argument that holds the layers.
lb2_status add_layer(const char* list, int64_t num_layers, const lb2_layer_shape& layer,
                     CallShape* call) noexcept;

// Adds to a message, where there are several layers, which one it is about; returns `status`.
lb2_status name_layer(const char* list, int64_t num_layers, int64_t index, lb2_status status) noexcept;

// Checks the shapes that a caller gave, and what they belong to, and fills *call.
lb2_status gather_shapes(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m, lb2_dtype dtype,
                         CallShape* call) noexcept;

}  // namespace lb2::cuda
