// Which paths of a layer share their first stage.
#pragma once

#include "littlebit2/littlebit2.h"

namespace lb2 {

struct FirstStages {
  int num_groups;                // distinct first stages
  int leader_of[LB2_MAX_PATHS];  // group -> its first path
  int group_of[LB2_MAX_PATHS];   // path -> its group
};

FirstStages find_first_stages(const lb2_path* const* paths, int num_paths) noexcept;
FirstStages find_first_stages(const lb2_linear_args& args) noexcept;

// Sign-accumulate operations of the forward call; INT64_MAX when there are more.
int64_t count_macs(const lb2_linear_args& args, const FirstStages& stages) noexcept;

}  // namespace lb2
