// The stages of a call for planning: groups of rows, each a sum of terms.
#pragma once

#include "cuda/params.h"
#include "cuda/plan/shape.h"

namespace lb2::cuda {

struct Work {
  int stage = 0;
  bool last = false;  // the output of the call, which cannot be split into parts
  int num_groups = 0, num_terms = 0;
  int64_t rows[LB2_MAX_PATHS];             // of each group
  int first_term[LB2_MAX_PATHS + 1] = {};  // of each group, and the end
  int64_t cols[LB2_MAX_PATHS];             // of each term

  int64_t slices(int term) const { return divide_up(cols[term], kSliceCols); }
  int64_t all_slices() const;
  int64_t all_rows() const;
  // The most parts of part_cols columns in one group.
  int64_t most_parts(int64_t part_cols) const;
  int64_t block_slices() const { return most_parts(kSliceCols); }
  int64_t row_tiles(int64_t tile_rows) const;
};

struct Stages {
  Work work[2];
  int count;  // 1 for layers of a single stage
};

Stages find_stages(const CallShape& call) noexcept;

}  // namespace lb2::cuda
