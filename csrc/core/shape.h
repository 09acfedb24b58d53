// The shape of a layer: sizes, and which paths share their first stage.
#pragma once

#include "littlebit2/littlebit2.h"

namespace lb2 {

// Bytes of an activation; check_dtype must have passed.
constexpr int64_t element_bytes(lb2_dtype dtype) { return dtype == LB2_FLOAT32 ? 4 : 2; }

// The distinct first stages of some paths.
struct FirstStages {
  int num_groups;                // distinct first stages
  int leader_of[LB2_MAX_PATHS];  // group -> its first path
  int group_of[LB2_MAX_PATHS];   // path -> its group
};

// The shape of args, without any check but that of num_paths and of paths being there, which must have
// passed. Paths share a first stage if their v, v_stride, in_scale and rank are equal.
lb2_layer_shape shape_of(const lb2_linear_args& args) noexcept;

// Adds the paths of a shape that check_shape passed as the paths that follow the first `num_paths`.
void add_first_stages(const lb2_layer_shape& shape, int num_paths, FirstStages* stages) noexcept;
FirstStages find_first_stages(const lb2_layer_shape& shape) noexcept;

// Sign-accumulate operations of a forward call with m tokens; INT64_MAX if there are more.
int64_t count_macs(const lb2_layer_shape& shape, int64_t m) noexcept;

}  // namespace lb2
