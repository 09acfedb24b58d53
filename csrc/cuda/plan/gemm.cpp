#include "cuda/plan/gemm.h"

#include <algorithm>

namespace lb2::cuda {
namespace {

constexpr int64_t kMostTokens = 4096;  // tokens per round of launches
constexpr int64_t kLeastTokens = 256;
constexpr int64_t kTokenStep = 128;                // the widest tile
constexpr int64_t kRoundBytes = 96 * 1024 * 1024;  // workspace of a round, about
constexpr int64_t kSplitBytes = 64 * 1024 * 1024;  // latents in parts

struct Choice {
  GemmTile tile;
  int64_t splits;
};

// Estimated cycles of a stage for all tokens of a round. From instruction counts, to be replaced by
// measurements; only the order of estimates matters here.
int64_t estimated_cycles(const Work& work, const Choice& choice, int64_t tokens, const Plan& plan) {
  constexpr int64_t kStage = 150;      // a barrier, and issuing copies
  constexpr int64_t kReadParts = 600;  // by the next stage, four parts at a time
  const lb2_activation mode = plan.activation;
  const int64_t terms = gemm_terms(mode), steps = gemm_steps(mode) / kSliceIndices;
  const int64_t slices = divide_up(work.block_slices(), choice.splits);
  const int64_t indices = divide_up(work.most_parts(kIndexCols), choice.splits);
  const int64_t shared = gemm_shared_bytes(mode, choice.tile.rows, choice.tile.tokens, slices);
  // Like the launch bounds of the kernel, if shared memory has room for two blocks.
  const bool few_sums = choice.tile.tokens == 32 && (mode != LB2_ACTIVATION_EXACT || choice.tile.rows == 64);
  const int64_t at_once = few_sums && 2 * (shared + 1024) <= plan.device.shared_bytes + 1024 ? 2 : 1;
  const int64_t blocks =
      work.row_tiles(choice.tile.rows) * divide_up(tokens, choice.tile.tokens) * choice.splits;
  const int64_t multiprocessors = plan.device.multiprocessors;
  const int64_t waves = divide_up(blocks, at_once * multiprocessors);
  const int64_t resident = std::min(at_once, divide_up(blocks, multiprocessors));
  const int64_t mmas =
      (choice.tile.rows / kTileRows) * (choice.tile.tokens / kGroupTokens) * steps * 2 * terms;
  const int64_t multiply = mmas * mma_cycles(mode, plan.device.capability) / 4;
  const int64_t latency =
      steps * terms * kStepLatency + gemm_slice_stages(mode, choice.tile.tokens) * kStage / kSliceIndices;
  const int64_t compute = waves * (kGemmBlockCycles + indices * std::max(resident * multiply, latency));
  const int64_t index_bytes = choice.tile.tokens / kGroupTokens * gemm_step_bytes(mode) * steps;
  const int64_t copies = blocks * indices * index_bytes / kL2Bytes;
  const int64_t parts = choice.splits == 1
                            ? 0
                            : work.block_slices() * tokens * work.all_rows() * 4 * 2 / kL2Bytes +
                                  divide_up(work.block_slices(), 4) * kReadParts;
  return std::max(compute, copies) + parts;
}

// Neither tile nor split changes the order in which the products of a token are added.
lb2_cuda_launch choose(const Work& work, int64_t tokens, const lb2_cuda_tuning& tuning, const Plan& plan) {
  const int stage = work.stage;
  const int64_t slices = work.block_slices();
  const bool fits = slices * tokens * work.all_rows() * 4 <= kSplitBytes;
  const int64_t wanted = work.last ? 1 : tuning.splits;
  const int64_t most = wanted != 0 ? wanted : fits ? std::min(slices, kMostSplits) : 1;
  lb2_cuda_launch launch = {};
  launch.kind = LB2_CUDA_GEMM;
  launch.stage = stage;
  launch.threads = kThreads;
  int64_t best = INT64_MAX;
  for (const GemmTile& tile : kGemmTiles) {
    if (!has_gemm_tile(plan.activation, tile.rows, tile.tokens)) continue;
    if (tuning.gemm_rows[stage] != 0 && tuning.gemm_rows[stage] != tile.rows) continue;
    if (tuning.gemm_tokens[stage] != 0 && tuning.gemm_tokens[stage] != tile.tokens) continue;
    for (int64_t splits = wanted != 0 ? wanted : 1; splits <= most; ++splits) {
      const int64_t cycles = estimated_cycles(work, {tile, splits}, tokens, plan);
      if (cycles >= best) continue;
      best = cycles;
      launch.estimated_cycles = cap_cycles(cycles);
      launch.row_tile = tile.rows;
      launch.token_tile = tile.tokens;
      launch.shared_bytes =
          gemm_shared_bytes(plan.activation, tile.rows, tile.tokens, divide_up(slices, splits));
      launch.grid_x = static_cast<int32_t>(work.row_tiles(tile.rows));
      launch.grid_y = static_cast<int32_t>(splits);
      launch.grid_z = static_cast<int32_t>(divide_up(tokens, tile.tokens));
    }
  }
  return launch;
}

}  // namespace

int64_t mma_cycles(lb2_activation activation, int32_t capability) noexcept {
  if (capability == 90) return 6;
  const bool geforce = capability == 86 || capability == 89 || capability >= 120;
  if (!geforce) return 8;
  return activation == LB2_ACTIVATION_INT8 ? 16 : 32;
}

void add_gemm_launches(const Stages& stages, int64_t tokens, const lb2_cuda_tuning& tuning,
                       Plan* plan) noexcept {
  const bool two_stages = stages.count == 2;
  const Work& first = stages.work[0];
  // Rounds of about equal size, each as large as the workspace allows.
  const int64_t block = gemm_block_bytes(plan->activation);
  int64_t token_bytes = 0;
  for (int s = 0; s < stages.count; ++s)
    token_bytes = std::max(token_bytes, stages.work[s].all_slices() * block / kGroupTokens);
  if (two_stages) token_bytes += first.all_rows() * 4;
  const int64_t most =
      std::clamp(kRoundBytes / token_bytes / kTokenStep * kTokenStep, kLeastTokens, kMostTokens);
  const int64_t rounds = divide_up(tokens, most);
  plan->token_block = std::min(tokens, divide_up(divide_up(tokens, rounds), kTokenStep) * kTokenStep);
  const int64_t groups = divide_up(plan->token_block, kGroupTokens);

  // The conversion of the second stage overwrites that of the first, which is no longer needed.
  int64_t converted_bytes = 0;
  const int32_t chained = is_chained(*plan, tuning);
  for (int s = 0; s < stages.count; ++s) {
    const Work& work = stages.work[s];
    int64_t offset = 0;
    for (int i = 0; i < work.num_terms; ++i) {
      plan->converted_offset[s][i] = offset;
      offset += align_bytes(groups * work.slices(i) * block);
    }
    converted_bytes = std::max(converted_bytes, offset);
    lb2_cuda_launch convert = {};
    convert.kind = LB2_CUDA_CONVERT;
    convert.stage = s;
    convert.grid_x = static_cast<int32_t>(work.all_slices());
    convert.grid_y = 1;
    convert.grid_z = static_cast<int32_t>(groups);
    convert.threads = kThreads;
    convert.token_tile = kGroupTokens;
    convert.chained = chained;
    lb2_cuda_launch multiply = choose(work, plan->token_block, tuning, *plan);
    multiply.chained = chained;
    plan->launches[plan->num_launches++] = convert;
    plan->launches[plan->num_launches++] = multiply;
  }
  plan->workspace_bytes = converted_bytes;
  if (!two_stages) return;
  // One part per slice if the slices are split.
  plan->sum_parts = plan->launches[1].grid_y > 1 ? first.slices(0) : 1;
  for (int g = 0; g < first.num_groups; ++g) {
    plan->sums_offset[g] = plan->workspace_bytes;
    plan->workspace_bytes += align_bytes(plan->sum_parts * plan->token_block * first.rows[g] * 4);
  }
}

bool is_gemm(const lb2_cuda_plan& plan) noexcept {
  return plan.num_launches > 1 && plan.launches[1].kind == LB2_CUDA_GEMM;
}

void read_gemm_tuning(const lb2_cuda_plan& made, lb2_cuda_tuning* tuning) noexcept {
  for (const lb2_cuda_launch& launch : made.launches) {
    if (launch.kind != LB2_CUDA_GEMM) continue;
    const int stage = launch.stage == 1;
    tuning->gemm_rows[stage] = launch.row_tile;
    tuning->gemm_tokens[stage] = launch.token_tile;
    if (stage == 0 && made.num_launches > 2) tuning->splits = launch.grid_y;
  }
}

}  // namespace lb2::cuda
