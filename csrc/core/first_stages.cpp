#include "core/first_stages.h"

namespace lb2 {

FirstStages find_first_stages(const lb2_path* const* paths, int num_paths) noexcept {
  FirstStages stages = {};
  for (int p = 0; p < num_paths; ++p) {
    const lb2_path& path = *paths[p];
    int group = 0;
    for (; group < stages.num_groups; ++group) {
      const lb2_path& leader = *paths[stages.leader_of[group]];
      if (leader.v == path.v && leader.v_stride == path.v_stride && leader.rank == path.rank &&
          leader.in_scale == path.in_scale)
        break;
    }
    if (group == stages.num_groups) stages.leader_of[stages.num_groups++] = p;
    stages.group_of[p] = group;
  }
  return stages;
}

FirstStages find_first_stages(const lb2_linear_args& args) noexcept {
  const lb2_path* paths[LB2_MAX_PATHS];
  const int num_paths = static_cast<int>(args.num_paths);
  for (int p = 0; p < num_paths; ++p) paths[p] = args.paths + p;
  return find_first_stages(paths, num_paths);
}

int64_t count_macs(const lb2_linear_args& args, const FirstStages& stages) noexcept {
  // Dimensions are below 2^31, so a product of two fits; sums and the product with m may not.
  int64_t per_token = 0, macs;
  bool overflow = false;
  const auto add_stage = [&](int64_t rows, int64_t cols) {
    overflow = __builtin_add_overflow(per_token, rows * cols, &per_token) || overflow;
  };
  for (int g = 0; g < stages.num_groups; ++g) add_stage(args.paths[stages.leader_of[g]].rank, args.k);
  if (args.paths[0].u != nullptr)
    for (int p = 0; p < static_cast<int>(args.num_paths); ++p) add_stage(args.n, args.paths[p].rank);
  overflow = __builtin_mul_overflow(per_token, args.m, &macs) || overflow;
  return overflow ? INT64_MAX : macs;
}

}  // namespace lb2
