#include "cuda/plan.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <type_traits>

#include "core/check.h"
#include "core/status.h"
#include "cuda/instances.h"

namespace lb2::cuda {
namespace {

constexpr int32_t kLeastCapability = 80;
// From 100 on, the compiler emulates 1-bit MMAs with integer instructions (seen in the machine code of
// CUDA 13.0).
constexpr int32_t kLastOneBitCapability = 99;
constexpr int32_t kLeastChained = 90;  // programmatic dependent launch

constexpr int64_t kTokenBlock = 128;  // bounds the workspace
constexpr int64_t kMostSplits = 32;
constexpr int64_t kChunkBytes = 96 * 1024;  // of staged activations: room for two blocks on an sm_90

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t align(int64_t bytes) { return divide_up(bytes, kWorkspaceAlignment) * kWorkspaceAlignment; }

// One stage as planning sees it: `rows` counted in tiles of each term, `slices` of all terms that one block
// adds.
struct Work {
  int64_t term_rows[LB2_MAX_PATHS];
  int num_terms;
  int64_t slices;
  bool alone;  // each term has its own rows; else all add into the same
};

int64_t row_tiles(const Work& work, int row_warps) {
  const int64_t tile = kTileRows * row_warps;
  if (!work.alone) return divide_up(work.term_rows[0], tile);
  int64_t tiles = 0;
  for (int i = 0; i < work.num_terms; ++i) tiles += divide_up(work.term_rows[i], tile);
  return tiles;
}

// Estimated cycles of a stage for one token. Leads from instruction counts, to be replaced by measurements;
// only their order matters here.
int64_t estimated_cycles(const Work& work, int row_warps, int64_t splits, int32_t multiprocessors) {
  constexpr int64_t kLatency = 1500;    // first loads, final sums
  constexpr int64_t kStageSlice = 400;  // one warp, one slice
  constexpr int64_t kMultiplySlice = 150;
  constexpr int64_t kAddPart = 60;      // a part more for the next stage to read
  constexpr int64_t kBlocksAtOnce = 2;  // of an SM
  const int64_t blocks = row_tiles(work, row_warps) * splits;
  const int64_t waves = divide_up(blocks, kBlocksAtOnce * multiprocessors);
  const int64_t slices = divide_up(work.slices, splits);
  return waves * (kLatency + divide_up(slices, kWarps) * kStageSlice +
                  divide_up(slices, kWarps / row_warps) * kMultiplySlice) +
         splits * kAddPart;
}

// A number that tuning asks for, or the range to choose from.
struct Range {
  int64_t least, most;
  Range(int32_t wanted, int64_t largest)
      : least(wanted != 0 ? wanted : 1), most(wanted != 0 ? wanted : largest) {}
};

// Does not look at the number of tokens: it decides the order in which sums are taken.
void choose_shape(const Work& work, int32_t multiprocessors, int32_t wanted_row_warps, int32_t wanted_splits,
                  lb2_cuda_stage* stage) {
  const Range warps(wanted_row_warps, kWarps);
  const Range parts(wanted_splits, work.alone ? std::min<int64_t>(work.slices, kMostSplits) : 1);
  int64_t best = INT64_MAX;
  for (int64_t row_warps = warps.least; row_warps <= warps.most; row_warps *= 2)
    for (int64_t splits = parts.least; splits <= parts.most; splits *= 2) {
      const int64_t cycles = estimated_cycles(work, static_cast<int>(row_warps), splits, multiprocessors);
      if (cycles >= best) continue;
      best = cycles;
      stage->estimated_cycles = static_cast<int32_t>(std::min<int64_t>(cycles, INT32_MAX));
      stage->row_warps = static_cast<int32_t>(row_warps);
      stage->split_warps = kWarps / stage->row_warps;
      stage->grid_y = static_cast<int32_t>(splits);
      stage->grid_x = static_cast<int32_t>(row_tiles(work, stage->row_warps));
    }
}

int token_tile(int64_t tokens) {
  for (const int tile : kTokenTiles)
    if (tokens <= tile) return tile;
  return kMaxTokenTile;
}

// Fills what depends on the tokens: tile, grid_z, chunk and shared memory.
void fit_tokens(lb2_activation activation, int64_t tokens, int64_t most_slices, int64_t shared_bytes,
                int32_t max_chunk, lb2_cuda_stage* stage) {
  stage->token_tile = token_tile(tokens);
  stage->grid_z = static_cast<int32_t>(std::max<int64_t>(1, divide_up(tokens, stage->token_tile)));
  stage->threads = kThreads;
  const int64_t slice = slice_bytes(activation, stage->token_tile), sums = sums_bytes(stage->token_tile);
  const int64_t room = std::min(kChunkBytes, shared_bytes - sums) / slice;
  const int64_t wanted = max_chunk != 0 ? std::min<int64_t>(max_chunk, room) : room;
  const int64_t chunk = std::max<int64_t>(1, std::min(wanted, divide_up(most_slices, stage->grid_y)));
  stage->chunk_slices = static_cast<int32_t>(chunk);
  stage->shared_bytes = static_cast<int32_t>(chunk * slice + sums);
}

lb2_status resolve_activation(const lb2_linear_args& args, const lb2_cuda_device& device,
                              lb2_activation* activation) {
  if (*activation < LB2_ACTIVATION_AUTO || *activation > LB2_ACTIVATION_FLOAT16)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "activation must be LB2_ACTIVATION_AUTO (0), _EXACT (1), _INT16 (2), _INT8 (3), _SIGN (4) or "
                "_FLOAT16 (5), got %" PRId32,
                *activation);
  if (*activation != LB2_ACTIVATION_AUTO) return LB2_OK;
  *activation = args.dtype == LB2_FLOAT32                    ? LB2_ACTIVATION_EXACT
                : device.capability <= kLastOneBitCapability ? LB2_ACTIVATION_INT16
                                                             : LB2_ACTIVATION_FLOAT16;
  return LB2_OK;
}

int64_t slices_of(int64_t cols) { return divide_up(cols, kSliceCols); }

lb2_status check_tuning(const lb2_cuda_tuning& tuning, int64_t most_splits) {
  for (const int32_t warps : tuning.row_warps)
    if (warps < 0 || warps > kWarps || (warps & (warps - 1)) != 0)
      return fail(LB2_ERROR_INVALID_ARGUMENT, "tuning->row_warps must be 0, 1, 2, 4 or 8, got %" PRId32,
                  warps);
  if (tuning.splits < 0 || tuning.splits > most_splits)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "tuning->splits must be between 0 and %" PRId64 ", got %" PRId32,
                most_splits, tuning.splits);
  if (tuning.max_chunk < 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "tuning->max_chunk must be >= 0, got %" PRId32, tuning.max_chunk);
  return LB2_OK;
}

lb2_status check_plan_struct(const lb2_cuda_plan* plan) {
  if (plan == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "plan must not be NULL");
  if (plan->struct_size != sizeof(lb2_cuda_plan))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "plan->struct_size must equal sizeof(lb2_cuda_plan) = %zu, got %" PRIu64,
                sizeof(lb2_cuda_plan), plan->struct_size);
  return LB2_OK;
}

}  // namespace

lb2_status check_device(const lb2_cuda_device* device) noexcept {
  if (device == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "device must not be NULL");
  if (device->struct_size != sizeof(lb2_cuda_device))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "device->struct_size must equal sizeof(lb2_cuda_device) = %zu, got %" PRIu64,
                sizeof(lb2_cuda_device), device->struct_size);
  if (device->capability < kLeastCapability)
    return fail(LB2_ERROR_UNSUPPORTED,
                "the CUDA kernels need a GPU of compute capability 8.0 or newer, got %" PRId32 ".%" PRId32,
                device->capability / 10, device->capability % 10);
  if (device->multiprocessors < 1)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "device->multiprocessors must be >= 1, got %" PRId32,
                device->multiprocessors);
  // One slice of 16 tokens in the widest mode.
  const int64_t least = slice_bytes(LB2_ACTIVATION_EXACT, kMaxTokenTile) + sums_bytes(kMaxTokenTile);
  if (device->shared_bytes < least)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "device->shared_bytes must be >= %" PRId64 ", got %" PRId64,
                least, device->shared_bytes);
  return LB2_OK;
}

lb2_status make_plan(const lb2_linear_args& args, lb2_activation activation, const lb2_cuda_device& device,
                     const lb2_cuda_tuning* given, Plan* plan) noexcept {
  *plan = {};
  plan->struct_size = sizeof(lb2_cuda_plan);
  plan->device = device;
  LB2_RETURN_IF_ERROR(resolve_activation(args, device, &activation));
  const lb2_cuda_tuning tuning = given != nullptr ? *given : lb2_cuda_tuning{};
  plan->activation = activation;
  plan->one_bit_mma = is_one_bit(activation);
  plan->first = find_first_stages(args);
  plan->first_stages = plan->first.num_groups;
  plan->macs = count_macs(args, plan->first);
  const bool single_stage = args.paths[0].u == nullptr;
  plan->num_stages = single_stage ? 1 : 2;
  plan->token_block = std::min(args.m, kTokenBlock);
  LB2_RETURN_IF_ERROR(check_tuning(tuning, single_stage ? 1 : slices_of(args.k)));

  Work last = {};
  last.num_terms = static_cast<int>(args.num_paths);
  last.term_rows[0] = args.n;
  int64_t most_slices = 0;
  for (int p = 0; p < last.num_terms; ++p) {
    const int64_t slices = slices_of(single_stage ? args.k : args.paths[p].rank);
    last.slices += slices;
    most_slices = std::max(most_slices, slices);
  }
  lb2_cuda_stage& end = plan->stages[plan->num_stages - 1];
  choose_shape(last, device.multiprocessors, tuning.row_warps[plan->num_stages - 1], 0, &end);
  fit_tokens(activation, plan->token_block, most_slices, device.shared_bytes, tuning.max_chunk, &end);
  if (single_stage) return LB2_OK;

  Work first = {};
  first.alone = true;
  first.num_terms = plan->first.num_groups;
  first.slices = slices_of(args.k);
  for (int g = 0; g < first.num_terms; ++g) first.term_rows[g] = args.paths[plan->first.leader_of[g]].rank;
  choose_shape(first, device.multiprocessors, tuning.row_warps[0], tuning.splits, &plan->stages[0]);
  fit_tokens(activation, plan->token_block, first.slices, device.shared_bytes, tuning.max_chunk,
             &plan->stages[0]);
  end.chained = device.capability >= kLeastChained && !tuning.unchained;
  for (int g = 0; g < first.num_terms; ++g) {
    plan->sums_offset[g] = plan->workspace_bytes;
    plan->workspace_bytes += align(plan->stages[0].grid_y * plan->token_block * first.term_rows[g] * 4);
  }
  if (plan->workspace_bytes > 0) plan->workspace_bytes += kWorkspaceAlignment;
  return LB2_OK;
}

lb2_status resume_plan(const lb2_linear_args& args, const lb2_cuda_plan* made, Plan* plan) noexcept {
  LB2_RETURN_IF_ERROR(check_plan_struct(made));
  LB2_RETURN_IF_ERROR(check_device(&made->device));
  lb2_cuda_tuning tuning = {};
  tuning.struct_size = sizeof tuning;
  for (int i = 0; i < 2; ++i) {
    tuning.row_warps[i] = made->stages[i].row_warps;
    tuning.max_chunk = std::max(tuning.max_chunk, made->stages[i].chunk_slices);
  }
  tuning.splits = made->num_stages == 2 ? made->stages[0].grid_y : 0;
  tuning.unchained = made->num_stages == 2 && !made->stages[1].chained;
  const bool planned = make_plan(args, made->activation, made->device, &tuning, plan) == LB2_OK;
  // Every member is an integer, and there is no padding: equal plans are equal bytes.
  static_assert(std::has_unique_object_representations_v<lb2_cuda_plan>);
  if (planned && std::memcmp(static_cast<const lb2_cuda_plan*>(plan), made, sizeof *made) == 0) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "plan must be what lb2_linear_plan_cuda made for the sizes and paths of args (m=%" PRId64
              ", k=%" PRId64 ", n=%" PRId64 ", num_paths=%" PRId64 "), got one that differs",
              args.m, args.k, args.n, args.num_paths);
}

lb2_cuda_stage stage_launch(const Plan& plan, int stage, int64_t tokens) noexcept {
  lb2_cuda_stage launch = plan.stages[stage];
  launch.grid_z = static_cast<int32_t>(divide_up(tokens, launch.token_tile));
  return launch;
}

StageParams stage_params(const lb2_linear_args& args, const Plan& plan, int stage, int64_t first,
                         int64_t tokens, char* workspace) noexcept {
  const bool last = stage + 1 == plan.num_stages, reads_input = stage == 0;
  const lb2_cuda_stage& shape = plan.stages[stage];
  const int64_t element_bytes = args.dtype == LB2_FLOAT32 ? 4 : 2;
  const char* input = static_cast<const char*>(args.input) + first * args.input_stride * element_bytes;
  StageParams params = {};
  params.input_stride = reads_input ? args.input_stride : 0;
  params.input_dtype = reads_input ? args.dtype : LB2_FLOAT32;
  params.num_parts = reads_input ? 1 : plan.stages[0].grid_y;
  params.m = static_cast<int32_t>(tokens);
  params.splits = shape.grid_y;
  params.row_warps = shape.row_warps;
  params.chunk_slices = shape.chunk_slices;
  params.alone = !last;
  params.num_terms = static_cast<int32_t>(last ? args.num_paths : plan.first.num_groups);
  if (last) {
    params.output = static_cast<char*>(args.output) + first * args.output_stride * element_bytes;
    params.output_stride = args.output_stride;
    params.output_dtype = args.dtype;
    params.bias = args.bias;
  }
  int64_t first_tile = 0;
  for (int i = 0; i < params.num_terms; ++i) {
    const lb2_path& path = args.paths[last ? i : plan.first.leader_of[i]];
    const auto group_sums = [&](int group) {
      return reinterpret_cast<float*>(workspace + plan.sums_offset[group]);
    };
    Term& term = params.terms[i];
    term.row_scale = last ? path.out_scale : nullptr;
    if (reads_input) {
      term.input = input;
      term.scale = path.in_scale;
      term.words = reinterpret_cast<const uint32_t*>(path.v);
      term.word_stride = path.v_stride;
      term.rows = static_cast<int32_t>(path.rank);
      term.cols = static_cast<int32_t>(args.k);
    } else {
      term.input = group_sums(plan.first.group_of[i]);
      term.scale = path.latent_scale;
      term.words = reinterpret_cast<const uint32_t*>(path.u);
      term.word_stride = path.u_stride;
      term.part_stride = tokens * path.rank;
      term.rows = static_cast<int32_t>(args.n);
      term.cols = static_cast<int32_t>(path.rank);
    }
    if (last) continue;
    term.sums = group_sums(i);
    term.first_tile = static_cast<int32_t>(first_tile);
    first_tile += divide_up(term.rows, kTileRows * shape.row_warps);
  }
  return params;
}

char* align_workspace(void* workspace) noexcept {
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  return static_cast<char*>(workspace) +
         (kWorkspaceAlignment - address % kWorkspaceAlignment) % kWorkspaceAlignment;
}

}  // namespace lb2::cuda

lb2_status lb2_linear_plan_cuda(const lb2_linear_args* args, lb2_activation activation,
                                const lb2_cuda_device* device, const lb2_cuda_tuning* tuning,
                                lb2_cuda_plan* out) {
  LB2_RETURN_IF_ERROR(lb2::check_layer(args));
  LB2_RETURN_IF_ERROR(lb2::cuda::check_device(device));
  LB2_RETURN_IF_ERROR(lb2::cuda::check_plan_struct(out));
  if (tuning != nullptr && tuning->struct_size != sizeof(lb2_cuda_tuning))
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT,
                     "tuning->struct_size must equal sizeof(lb2_cuda_tuning) = %zu, got %" PRIu64,
                     sizeof(lb2_cuda_tuning), tuning->struct_size);
  lb2::cuda::Plan plan;
  LB2_RETURN_IF_ERROR(lb2::cuda::make_plan(*args, activation, *device, tuning, &plan));
  *out = plan;
  return LB2_OK;
}
