#include "cuda/gemm_plan.h"

#include <algorithm>

namespace lb2::cuda {
namespace {

constexpr int64_t kMostTokens = 4096;  // of a round of launches
constexpr int64_t kLeastTokens = 256;
constexpr int64_t kTokenStep = 128;                // the widest tile
constexpr int64_t kRoundBytes = 96 * 1024 * 1024;  // of workspace, about, that a round may take
constexpr int64_t kSplitBytes = 64 * 1024 * 1024;  // of latents in parts
constexpr int64_t kMostSplits = 32;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t align(int64_t bytes) { return divide_up(bytes, kWorkspaceAlignment) * kWorkspaceAlignment; }

// One stage as planning sees it: groups of rows, each the sum of some terms.
struct Work {
  bool last = false;
  int num_groups = 0, num_terms = 0;
  int64_t rows[LB2_MAX_PATHS];             // of a group
  int first_term[LB2_MAX_PATHS + 1] = {};  // likewise, and the end
  int64_t cols[LB2_MAX_PATHS];             // of a term

  void add_group(int64_t group_rows) {
    rows[num_groups++] = group_rows;
    first_term[num_groups] = num_terms;
  }
  // To the last of the groups.
  void add_term(int64_t term_cols) {
    cols[num_terms++] = term_cols;
    first_term[num_groups] = num_terms;
  }

  int64_t slices(int term) const { return divide_up(cols[term], kSliceCols); }
  int64_t all_slices() const {
    int64_t sum = 0;
    for (int i = 0; i < num_terms; ++i) sum += slices(i);
    return sum;
  }
  // Of a block of the group that has most of them.
  int64_t most(int64_t part_cols) const {
    int64_t largest = 0;
    for (int g = 0; g < num_groups; ++g) {
      int64_t sum = 0;
      for (int i = first_term[g]; i < first_term[g + 1]; ++i) sum += divide_up(cols[i], part_cols);
      largest = std::max(largest, sum);
    }
    return largest;
  }
  int64_t block_slices() const { return most(kSliceCols); }
  int64_t block_indices() const { return most(kIndexCols); }
  int64_t row_tiles(int64_t tile) const {
    int64_t tiles = 0;
    for (int g = 0; g < num_groups; ++g) tiles += divide_up(rows[g], tile);
    return tiles;
  }
  int64_t all_rows() const {
    int64_t sum = 0;
    for (int g = 0; g < num_groups; ++g) sum += rows[g];
    return sum;
  }
};

struct Choice {
  GemmTile tile;
  int64_t splits;
};

// Cycles of a quarter of an SM for one MMA. The rates of mma.sync: half of the tensor cores' for float16 sums
// in fp32 on GeForce GPUs, about 0.65 of them on sm_90, whose full rate only wgmma has.
int64_t mma_cycles(lb2_activation activation, int32_t capability) {
  if (capability == 90) return 6;
  const bool halved = capability == 86 || capability == 89 || capability >= 120;
  return halved && activation != LB2_ACTIVATION_INT8 ? 16 : 8;
}

// Estimated cycles of a stage for all tokens of a round. Leads from instruction counts, to be replaced by
// measurements; only their order matters here.
int64_t estimated_cycles(const Work& work, const Choice& choice, int64_t tokens, const Plan& plan) {
  constexpr int64_t kStep = 70;        // of the two dependent MMAs of a step, and loading what they take
  constexpr int64_t kStage = 150;      // a barrier, and copies that are asked for
  constexpr int64_t kBlock = 2500;     // until the first stage is there; sums stored
  constexpr int64_t kL2Bytes = 2500;   // of all SMs in a cycle
  constexpr int64_t kReadParts = 600;  // by the next stage, four parts at once
  const lb2_activation mode = plan.activation;
  const int64_t terms = gemm_terms(mode), steps = gemm_steps(mode) / kSliceIndices;
  const int64_t slices = divide_up(work.block_slices(), choice.splits);
  const int64_t indices = divide_up(work.block_indices(), choice.splits);
  const int64_t shared = gemm_shared_bytes(mode, choice.tile.rows, choice.tile.tokens, slices);
  // As the kernel's launch bounds say, and where shared memory has room for it.
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
      steps * terms * kStep + gemm_slice_stages(mode, choice.tile.tokens) * kStage / kSliceIndices;
  const int64_t compute = waves * (kBlock + indices * std::max(resident * multiply, latency));
  const int64_t index_bytes = choice.tile.tokens / kGroupTokens * gemm_step_bytes(mode) * steps;
  const int64_t copies = blocks * indices * index_bytes / kL2Bytes;
  const int64_t parts = choice.splits == 1
                            ? 0
                            : work.block_slices() * tokens * work.all_rows() * 4 * 2 / kL2Bytes +
                                  divide_up(work.block_slices(), 4) * kReadParts;
  return std::max(compute, copies) + parts;
}

// Neither tile nor split changes the order in which the products of a token are added.
lb2_cuda_launch choose(const Work& work, int stage, int64_t tokens, const lb2_cuda_tuning& tuning,
                       const Plan& plan) {
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
      launch.estimated_cycles = static_cast<int32_t>(std::min<int64_t>(cycles, INT32_MAX));
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

int64_t slices_of(int64_t cols) { return divide_up(cols, kSliceCols); }

// Of the first stage's sums: slices, where these are split.
int64_t parts_of(const Plan& plan, const lb2_linear_args& args) {
  return plan.launches[1].grid_y > 1 ? slices_of(args.k) : 1;
}

}  // namespace

void add_gemm_launches(const Layers& layers, const lb2_cuda_tuning& tuning, Plan* plan) noexcept {
  const lb2_linear_args& args = layers.front();
  Work stages[2] = {};
  const int num_stages = layers.single_stage ? 1 : 2;
  if (!layers.single_stage)
    for (int g = 0; g < plan->first.num_groups; ++g) {
      stages[0].add_group(layers.paths[plan->first.leader_of[g]]->rank);
      stages[0].add_term(args.k);
    }
  Work& last = stages[num_stages - 1];
  last.last = true;
  for (int32_t i = 0; i < layers.count; ++i) {
    last.add_group(layers.args[i].n);
    for (int32_t p = layers.first_path[i]; p < layers.first_path[i + 1]; ++p)
      last.add_term(layers.single_stage ? args.k : layers.paths[p]->rank);
  }

  // Rounds of as many tokens as the workspace is to hold, all about the same.
  const int64_t block = gemm_block_bytes(plan->activation);
  int64_t token_bytes = 0;
  for (int s = 0; s < num_stages; ++s)
    token_bytes = std::max(token_bytes, stages[s].all_slices() * block / kGroupTokens);
  if (!layers.single_stage) token_bytes += stages[0].all_rows() * 4;
  const int64_t most =
      std::clamp(kRoundBytes / token_bytes / kTokenStep * kTokenStep, kLeastTokens, kMostTokens);
  const int64_t rounds = divide_up(args.m, most);
  plan->token_block = std::min(args.m, divide_up(divide_up(args.m, rounds), kTokenStep) * kTokenStep);
  const int64_t groups = divide_up(plan->token_block, kGroupTokens);

  // What was converted for the first stage is of no use once its sums are there: the second takes its place.
  int64_t converted_bytes = 0;
  const int32_t chained = plan->device.capability >= kLeastChained && !tuning.unchained;
  for (int s = 0; s < num_stages; ++s) {
    const Work& work = stages[s];
    int64_t offset = 0;
    for (int i = 0; i < work.num_terms; ++i) {
      plan->converted_offset[s][i] = offset;
      offset += align(groups * work.slices(i) * block);
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
    lb2_cuda_launch multiply = choose(work, s, plan->token_block, tuning, *plan);
    multiply.chained = chained;
    plan->launches[plan->num_launches++] = convert;
    plan->launches[plan->num_launches++] = multiply;
  }
  plan->workspace_bytes = converted_bytes;
  if (layers.single_stage) return;
  for (int g = 0; g < stages[0].num_groups; ++g) {
    plan->sums_offset[g] = plan->workspace_bytes;
    plan->workspace_bytes += align(parts_of(*plan, args) * plan->token_block * stages[0].rows[g] * 4);
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

GemmParams gemm_params(const Layers& layers, const Plan& plan, int index, int64_t first, int64_t tokens,
                       char* workspace) noexcept {
  const lb2_cuda_launch& launch = plan.launches[index];
  const lb2_linear_args& args = layers.front();
  const bool reads_input = launch.stage == 0, last = launch.stage == 1 || layers.single_stage;
  const int64_t element_bytes = args.dtype == LB2_FLOAT32 ? 4 : 2;
  GemmParams params = {};
  params.input_dtype = reads_input ? args.dtype : LB2_FLOAT32;
  params.output_dtype = last ? args.dtype : LB2_FLOAT32;
  params.num_parts = reads_input ? 1 : static_cast<int32_t>(parts_of(plan, args));
  params.m = static_cast<int32_t>(tokens);
  params.splits = launch.grid_y;
  const auto sums_of = [&](int stage) {
    return reinterpret_cast<float*>(workspace + plan.sums_offset[stage]);
  };
  int32_t tiles = 0, terms = 0;
  const auto add_group = [&](int64_t rows) -> Group& {
    Group& group = params.groups[params.num_groups++];
    group.rows = static_cast<int32_t>(rows);
    group.first_tile = tiles;
    group.first_term = group.last_term = terms;
    // Launches that convert have no rows.
    if (launch.row_tile > 0) tiles += static_cast<int32_t>(divide_up(rows, launch.row_tile));
    return group;
  };
  // Path p, in the last of the groups.
  const auto add_term = [&](int p) {
    const lb2_path& path = *layers.paths[p];
    GemmTerm& term = params.terms[terms];
    term.row_scale = last ? path.out_scale : nullptr;
    term.converted = reinterpret_cast<unsigned char*>(workspace) + plan.converted_offset[launch.stage][terms];
    if (reads_input) {
      term.input = static_cast<const char*>(args.input) + first * args.input_stride * element_bytes;
      term.input_stride = args.input_stride;
      term.scale = path.in_scale;
      term.words = reinterpret_cast<const uint32_t*>(path.v);
      term.word_stride = path.v_stride;
      term.cols = static_cast<int32_t>(args.k);
    } else {
      term.input = sums_of(plan.first.group_of[p]);
      term.input_stride = path.rank;
      term.part_stride = tokens * path.rank;
      term.scale = path.latent_scale;
      term.words = reinterpret_cast<const uint32_t*>(path.u);
      term.word_stride = path.u_stride;
      term.cols = static_cast<int32_t>(path.rank);
    }
    term.slices = static_cast<int32_t>(slices_of(term.cols));
    params.groups[params.num_groups - 1].last_term = ++terms;
  };
  if (!last) {
    for (int g = 0; g < plan.first.num_groups; ++g) {
      const int leader = plan.first.leader_of[g];
      Group& group = add_group(layers.paths[leader]->rank);
      group.output = sums_of(g);
      group.output_stride = group.rows;
      add_term(leader);
    }
    return params;
  }
  for (int32_t i = 0; i < layers.count; ++i) {
    const lb2_linear_args& layer = layers.args[i];
    Group& group = add_group(layer.n);
    group.output = static_cast<char*>(layer.output) + first * layer.output_stride * element_bytes;
    group.output_stride = layer.output_stride;
    group.bias = layer.bias;
    for (int32_t p = layers.first_path[i]; p < layers.first_path[i + 1]; ++p) add_term(p);
  }
  return params;
}

}  // namespace lb2::cuda
