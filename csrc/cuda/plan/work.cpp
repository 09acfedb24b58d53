#include "cuda/plan/work.h"

#include <algorithm>

namespace lb2::cuda {
namespace {

void add_group(int64_t rows, Work* work) {
  work->rows[work->num_groups++] = rows;
  work->first_term[work->num_groups] = work->num_terms;
}

// Adds a term to the last group.
void add_term(int64_t cols, Work* work) {
  work->cols[work->num_terms++] = cols;
  work->first_term[work->num_groups] = work->num_terms;
}

}  // namespace

int64_t Work::all_slices() const {
  int64_t sum = 0;
  for (int i = 0; i < num_terms; ++i) sum += slices(i);
  return sum;
}

int64_t Work::all_rows() const {
  int64_t sum = 0;
  for (int g = 0; g < num_groups; ++g) sum += rows[g];
  return sum;
}

int64_t Work::most_parts(int64_t part_cols) const {
  int64_t most = 0;
  for (int g = 0; g < num_groups; ++g) {
    int64_t parts = 0;
    for (int i = first_term[g]; i < first_term[g + 1]; ++i) parts += divide_up(cols[i], part_cols);
    most = std::max(most, parts);
  }
  return most;
}

int64_t Work::row_tiles(int64_t tile_rows) const {
  int64_t tiles = 0;
  for (int g = 0; g < num_groups; ++g) tiles += divide_up(rows[g], tile_rows);
  return tiles;
}

Stages find_stages(const CallShape& call) noexcept {
  Stages stages = {{}, call.single_stage ? 1 : 2};
  if (!call.single_stage)
    for (int g = 0; g < call.first.num_groups; ++g) {
      add_group(call.ranks[call.first.leader_of[g]], &stages.work[0]);
      add_term(call.k, &stages.work[0]);
    }
  Work& last = stages.work[stages.count - 1];
  last.stage = stages.count - 1;
  last.last = true;
  for (int32_t i = 0; i < call.num_layers; ++i) {
    add_group(call.n[i], &last);
    for (int32_t p = call.first_path[i]; p < call.first_path[i + 1]; ++p)
      add_term(call.single_stage ? call.k : call.ranks[p], &last);
  }
  return stages;
}

}  // namespace lb2::cuda
