#include "core/shape.h"

namespace lb2 {

lb2_layer_shape shape_of(const lb2_linear_args& args) noexcept {
  lb2_layer_shape shape = {};
  shape.struct_size = sizeof shape;
  shape.k = args.k;
  shape.n = args.n;
  shape.num_paths = args.num_paths;
  shape.single_stage = args.paths[0].u == nullptr;
  for (int p = 0; p < static_cast<int>(args.num_paths); ++p) {
    const lb2_path& path = args.paths[p];
    shape.ranks[p] = path.rank;
    int leader = 0;
    for (; leader < p; ++leader) {
      const lb2_path& other = args.paths[leader];
      if (shape.shares[leader] == leader && other.v == path.v && other.v_stride == path.v_stride &&
          other.rank == path.rank && other.in_scale == path.in_scale)
        break;
    }
    shape.shares[p] = leader;
  }
  return shape;
}

void add_first_stages(const lb2_layer_shape& shape, int num_paths, FirstStages* stages) noexcept {
  for (int p = 0; p < static_cast<int>(shape.num_paths); ++p) {
    const int path = num_paths + p, leader = num_paths + shape.shares[p];
    if (leader == path) stages->leader_of[stages->num_groups] = path;
    stages->group_of[path] = leader == path ? stages->num_groups++ : stages->group_of[leader];
  }
}

FirstStages find_first_stages(const lb2_layer_shape& shape) noexcept {
  FirstStages stages = {};
  add_first_stages(shape, 0, &stages);
  return stages;
}

int64_t count_macs(const lb2_layer_shape& shape, int64_t m) noexcept {
  // Dimensions are below 2^31, so a product of two fits; sums and the product with m may not.
  int64_t per_token = 0, macs;
  bool overflow = false;
  const auto add_stage = [&](int64_t rows, int64_t cols) {
    overflow = __builtin_add_overflow(per_token, rows * cols, &per_token) || overflow;
  };
  for (int p = 0; p < static_cast<int>(shape.num_paths); ++p) {
    if (shape.shares[p] == p) add_stage(shape.ranks[p], shape.k);
    if (!shape.single_stage) add_stage(shape.n, shape.ranks[p]);
  }
  overflow = __builtin_mul_overflow(per_token, m, &macs) || overflow;
  return overflow ? INT64_MAX : macs;
}

}  // namespace lb2
