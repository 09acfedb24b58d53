#include "cpu/prepacked/plan.h"

#include "cpu/prepacked/tiles/kernels.h"

namespace lb2::cpu {
namespace {

constexpr int64_t kPartsBytes =
    1 << 20;  // what a block hands on, mostly latents in several parts: an L2 cache
constexpr int64_t kLookupTaskTokens = 8;  // together with kMostTaskTiles: sums of a task stay in L2
constexpr int64_t kMostTaskTiles = 32;    // enough rows to hide the building of tables
constexpr int64_t kLeastTaskTiles = 2;
constexpr int64_t kMostTokenBlock = 128;
constexpr int64_t kTasksPerWorker = 2;  // so that a thread that lost its core delays the others less

// Pieces of `tiles` tiles, of which a phase with `all` tiles is to have `tasks`.
int64_t split_tiles(int64_t tiles, int64_t most_tiles, int64_t tasks, int64_t all) {
  const int64_t splits = std::max(divide_up(tiles, most_tiles), divide_up(tasks * tiles, all));
  return std::max<int64_t>(1, std::min(splits, tiles / kLeastTaskTiles));
}

int64_t output_tiles(const Layout& layout) { return divide_up(divide_up(layout.n, kBlockRows), kTileBlocks); }

// Most tiles and number of segments of the first stages that run in a phase of their own.
struct Stages {
  int64_t tiles, units;
  explicit Stages(const Layout& layout) : tiles(1), units(0) {
    for (int s = 0; s < layout.num_stages && !layout.single_stage; ++s) {
      const Matrix& v = layout.stages[s].v;
      tiles = std::max(tiles, v.tiles());
      units += v.num_segments;
    }
  }
};

class Planner {
 public:
  Planner(const Layout* const* layouts, int num_layers, const PlanInput& input, LayerPlan* layers)
      : layouts_(layouts), input_(input), layers_(layers) {
    double macs = 0.0;  // in doubles: the number of operations may pass 2^63
    int64_t token_bytes = 0;
    for (int i = 0; i < num_layers; ++i) {
      macs += static_cast<double>(macs_per_token(*layouts[i]));
      const Layout& layout = *layouts[i];
      for (int s = 0; s < layout.num_stages && !layout.single_stage; ++s)
        token_bytes += layout.stages[s].v.num_segments * layout.stages[s].v.padded_rows() * 4;
    }
    // Signs are expanded once for the tokens of a task.
    const int64_t most_tokens = std::max(input.mode.tokens, kLookupTaskTokens);
    const int64_t fitting =
        token_bytes == 0 ? kMostTokenBlock : kPartsBytes / token_bytes / most_tokens * most_tokens;
    plan_.token_block = std::min(input.m, std::clamp(fitting, most_tokens, kMostTokenBlock));
    task_tokens_ = std::min(plan_.token_block, most_tokens);
    plan_.token_unit = input.mode.planes == 0 ? 1 : kTileTokens;
    plan_.token_tasks = task_tokens_ == 0 ? 0 : divide_up(plan_.token_block, task_tokens_);
    const double useful =
        macs * static_cast<double>(plan_.token_block) / static_cast<double>(input.kernels.macs_per_worker);
    const bool few = useful < static_cast<double>(input.threads);
    plan_.workers = few ? std::max<int64_t>(1, static_cast<int64_t>(useful)) : input.threads;
    // Tasks that a phase must have for every token task.
    tasks_ = plan_.workers == 1
                 ? 1
                 : divide_up(kTasksPerWorker * plan_.workers, std::max<int64_t>(1, plan_.token_tasks));
    if (input.norm) plan_.factors = take(4 * plan_.token_block);
  }

  // Layers whose first stages run in one phase, and whose outputs run in another.
  void add_phases(int first, int count) {
    int64_t units = 0, all_tiles = 0;
    for (int i = first; i < first + count; ++i) {
      units += Stages(*layouts_[i]).units;
      all_tiles += output_tiles(*layouts_[i]);
    }
    for (int i = first; i < first + count; ++i) {
      const Layout& layout = *layouts_[i];
      const int64_t tiles = Stages(layout).tiles;
      layers_[i].stage_splits =
          split_tiles(tiles, tiles, divide_up(tasks_, std::max<int64_t>(1, units)), tiles);
      layers_[i].row_splits = split_tiles(output_tiles(layout), kMostTaskTiles, tasks_, all_tiles);
      add_task_tiles(divide_up(output_tiles(layout), layers_[i].row_splits));
      for (int s = 0; s < layout.num_stages && !layout.single_stage; ++s) {
        const Matrix& v = layout.stages[s].v;
        layers_[i].parts[s] = take(v.num_segments * v.padded_rows() * 4 * plan_.token_block);
      }
    }
  }

  // fp32 rows that the last layer reads. Tasks of both halves of a layer may begin within a tile.
  void add_hidden(int64_t columns) {
    plan_.hidden_stride = divide_up(columns, kLanesOfHidden) * kLanesOfHidden;
    plan_.hidden = take(plan_.hidden_stride * 4 * plan_.token_block);
    const int64_t tiles = divide_up(columns, kTileBlocks * kBlockRows);
    plan_.hidden_splits = split_tiles(tiles, kMostTaskTiles, tasks_, tiles);
    add_task_tiles(divide_up(tiles, plan_.hidden_splits) + 1);
    gate_ = true;
  }

  CallPlan finish() {
    const int64_t tables = align(input_.mode.tokens * input_.mode.token_bytes(kChunkWords));
    const int64_t rows = align((task_tiles_ * kTileBlocks * kBlockRows * task_tokens_ + kLanesOfHidden) * 4);
    plan_.worker_start = offset_;
    plan_.worker_tables = align((kOperandCols + 16) * 4);
    plan_.worker_dots = plan_.worker_tables + tables;
    plan_.worker_sums = plan_.worker_dots + rows;
    plan_.worker_gate = plan_.worker_sums + rows;
    plan_.worker_bytes = plan_.worker_gate + (gate_ ? rows : 0);
    plan_.workspace_bytes =
        plan_.token_block == 0 ? 0 : offset_ + plan_.workers * plan_.worker_bytes + kAlignment;
    return plan_;
  }

 private:
  static constexpr int64_t kLanesOfHidden = 16;

  int64_t take(int64_t bytes) {
    const int64_t start = offset_;
    offset_ += align(bytes);
    return start;
  }
  void add_task_tiles(int64_t tiles) { task_tiles_ = std::max(task_tiles_, tiles); }

  const Layout* const* layouts_;
  const PlanInput& input_;
  LayerPlan* layers_;
  CallPlan plan_ = {};
  int64_t task_tokens_, tasks_, offset_ = 0, task_tiles_ = 1;
  bool gate_ = false;
};

}  // namespace

CallPlan plan_group(const Layout* const* layouts, int num_layers, const PlanInput& input,
                    LayerPlan* layers) noexcept {
  Planner planner(layouts, num_layers, input, layers);
  planner.add_phases(0, num_layers);
  return planner.finish();
}

CallPlan plan_mlp(const Layout* const* layouts, int num_layers, const PlanInput& input,
                  LayerPlan* layers) noexcept {
  const int last = num_layers - 1;
  Planner planner(layouts, num_layers, input, layers);
  planner.add_phases(0, last);
  planner.add_hidden(layouts[last]->k);
  planner.add_phases(last, 1);
  return planner.finish();
}

}  // namespace lb2::cpu
