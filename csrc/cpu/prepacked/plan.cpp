#include "cpu/prepacked/plan.h"

namespace lb2::cpu {
namespace {

constexpr int64_t kPartsBytes = 1 << 20;  // latents of a block, in several parts: about an L2 cache
constexpr int64_t kMostTaskTokens = 8;    // together with kMostTaskTiles: sums of a task stay in L2
constexpr int64_t kMostTaskTiles = 32;    // enough rows to hide the building of tables
constexpr int64_t kLeastTaskTiles = 2;
constexpr int64_t kMostTokenBlock = 128;
constexpr int64_t kTasksPerWorker = 2;  // so that a thread that lost its core delays the others less

// Pieces of `tiles` tiles, so that `others` times as many tasks occupy the workers.
int64_t split_tiles(int64_t tiles, int64_t most_tiles, int64_t others, int64_t workers) {
  int64_t splits = divide_up(tiles, most_tiles);
  if (workers > 1) splits = std::max(splits, divide_up(kTasksPerWorker * workers, others));
  return std::max<int64_t>(1, std::min(splits, tiles / kLeastTaskTiles));
}

}  // namespace

PrepackedPlan plan_prepacked(const Layout& layout, const LookupKernels& kernels, const LookupMode& mode,
                             int64_t m, int64_t threads) noexcept {
  PrepackedPlan plan = {};
  int64_t part_bytes = 0, stage_tiles = 1, stage_units = 0;  // for one token
  for (int s = 0; s < layout.num_stages && !layout.single_stage; ++s) {
    const Matrix& v = layout.stages[s].v;
    part_bytes += v.num_segments * v.padded_rows() * 4;
    stage_tiles = std::max(stage_tiles, v.tiles());
    stage_units += v.num_segments;
  }
  const int64_t fitting =
      part_bytes == 0 ? kMostTokenBlock : kPartsBytes / part_bytes / kMostTaskTokens * kMostTaskTokens;
  plan.token_block = std::min(m, std::clamp(fitting, kMostTaskTokens, kMostTokenBlock));
  plan.task_tokens = std::min(plan.token_block, kMostTaskTokens);
  plan.token_tasks = plan.task_tokens == 0 ? 0 : divide_up(plan.token_block, plan.task_tokens);
  // In doubles: the number of operations may pass 2^63.
  const double macs = static_cast<double>(macs_per_token(layout)) * static_cast<double>(plan.token_block);
  const double useful = macs / static_cast<double>(kernels.macs_per_worker);
  plan.workers =
      useful < static_cast<double>(threads) ? std::max<int64_t>(1, static_cast<int64_t>(useful)) : threads;
  const int64_t token_tasks = std::max<int64_t>(1, plan.token_tasks);
  const int64_t output_tiles = divide_up(divide_up(layout.n, kBlockRows), kTileBlocks);
  plan.stage_splits =
      split_tiles(stage_tiles, stage_tiles, std::max<int64_t>(1, stage_units) * token_tasks, plan.workers);
  plan.row_splits = split_tiles(output_tiles, kMostTaskTiles, token_tasks, plan.workers);

  int64_t offset = 0;
  for (int s = 0; s < layout.num_stages && !layout.single_stage; ++s) {
    const Matrix& v = layout.stages[s].v;
    plan.parts[s] = offset;
    offset += align(v.num_segments * v.padded_rows() * 4 * plan.token_block);
  }
  plan.worker_start = offset;
  const int64_t tables = align(mode.tokens * mode.table_bytes * kChunkWords);
  const int64_t operand = align((kOperandCols + 16) * 4);
  const int64_t tile_rows = divide_up(output_tiles, plan.row_splits) * kTileBlocks * kBlockRows;
  const int64_t rows = align(tile_rows * plan.task_tokens * 4);
  plan.worker_tables = operand;
  plan.worker_sums = operand + tables;
  plan.worker_dots = plan.worker_sums + rows;
  plan.worker_bytes = plan.worker_dots + rows;
  plan.workspace_bytes = plan.token_block == 0 ? 0 : offset + plan.workers * plan.worker_bytes + kAlignment;
  return plan;
}

}  // namespace lb2::cpu
