// Plans the two calls of an MLP, which share a workspace. Pure functions.
#pragma once

#include "cuda/plan/plan.h"

namespace lb2::cuda {

struct MlpShape {
  int64_t num_first;  // layers of the first call
  int64_t width;      // K of down
  bool gated;         // whether two factors are multiplied
  bool halves;        // whether these are the halves of one layer
};

constexpr int64_t kMostMlpLayers = 3;

// Checks the description of the layers of a call and its function, and fills shapes.
LB2_API lb2_status check_mlp_layers(const lb2_linear_args* args, int64_t num_layers, lb2_function function,
                                    lb2_layer_shape* shapes) noexcept;

// Which of the layers of an MLP are what, by their sizes.
LB2_API lb2_status find_mlp_shape(const lb2_layer_shape* shapes, int64_t num_layers, MlpShape* mlp) noexcept;

// Bytes into the workspace: the workspace of both calls, and the outputs of the first one.
struct MlpWorkspace {
  int64_t outputs[2];  // [m, width] each, or [m, 2 width] for halves
  int64_t bytes;
};

LB2_API lb2_status lay_out_mlp(const MlpShape& mlp, int64_t m, lb2_dtype dtype, int64_t call_bytes,
                               MlpWorkspace* workspace) noexcept;

}  // namespace lb2::cuda
