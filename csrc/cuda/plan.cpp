#include "cuda/plan.h"

#include <algorithm>
#include <cinttypes>

#include "core/check.h"
#include "core/status.h"
#include "cuda/instances.h"

namespace lb2::cuda {
namespace {

constexpr int32_t kLeastCapability = 80;
// From 100 on, the compiler emulates 1-bit MMAs with integer instructions (seen in the machine code of
// CUDA 13.0).
constexpr int32_t kLastOneBitCapability = 99;

constexpr int64_t kTokenBlock = 128;        // bounds the workspace
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
  constexpr int64_t kLatency = 1500;    // launch, first loads, final sums
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

// Does not look at the number of tokens: it decides the order in which sums are taken.
void choose_shape(const Work& work, int32_t multiprocessors, lb2_cuda_stage* stage) {
  int64_t best = INT64_MAX;
  for (int row_warps = 1; row_warps <= kWarps; row_warps *= 2)
    for (int64_t splits = 1; splits <= 32; splits *= 2) {
      if (splits > 1 && (!work.alone || splits > work.slices)) break;
      const int64_t cycles = estimated_cycles(work, row_warps, splits, multiprocessors);
      if (cycles >= best) continue;
      best = cycles;
      stage->row_warps = row_warps;
      stage->split_warps = kWarps / row_warps;
      stage->grid_y = static_cast<int32_t>(splits);
      stage->grid_x = static_cast<int32_t>(row_tiles(work, row_warps));
    }
}

int token_tile(int64_t tokens) {
  for (const int tile : kTokenTiles)
    if (tokens <= tile) return tile;
  return kMaxTokenTile;
}

// Fills what depends on the tokens: tile, grid_z, chunk and shared memory.
void fit_tokens(lb2_activation activation, int64_t tokens, int64_t most_slices, int64_t shared_bytes,
                lb2_cuda_stage* stage) {
  stage->token_tile = token_tile(tokens);
  stage->grid_z = static_cast<int32_t>(std::max<int64_t>(1, divide_up(tokens, stage->token_tile)));
  stage->threads = kThreads;
  const int64_t slice = slice_bytes(activation, stage->token_tile), sums = sums_bytes(stage->token_tile);
  const int64_t room = std::min(kChunkBytes, shared_bytes - sums) / slice;
  const int64_t chunk = std::max<int64_t>(1, std::min(room, divide_up(most_slices, stage->grid_y)));
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
                     Plan* plan) noexcept {
  *plan = {};
  LB2_RETURN_IF_ERROR(resolve_activation(args, device, &activation));
  plan->activation = activation;
  plan->first = find_first_stages(args);
  const bool single_stage = args.paths[0].u == nullptr;
  plan->num_stages = single_stage ? 1 : 2;
  plan->token_block = std::min(args.m, kTokenBlock);

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
  choose_shape(last, device.multiprocessors, &end);
  fit_tokens(activation, plan->token_block, most_slices, device.shared_bytes, &end);
  if (single_stage) return LB2_OK;

  Work first = {};
  first.alone = true;
  first.num_terms = plan->first.num_groups;
  first.slices = slices_of(args.k);
  for (int g = 0; g < first.num_terms; ++g) first.term_rows[g] = args.paths[plan->first.leader_of[g]].rank;
  choose_shape(first, device.multiprocessors, &plan->stages[0]);
  fit_tokens(activation, plan->token_block, first.slices, device.shared_bytes, &plan->stages[0]);
  end.chained = device.capability >= 90;
  for (int g = 0; g < first.num_terms; ++g) {
    plan->sums_offset[g] = plan->workspace_bytes;
    plan->workspace_bytes += align(plan->stages[0].grid_y * plan->token_block * first.term_rows[g] * 4);
  }
  if (plan->workspace_bytes > 0) plan->workspace_bytes += kWorkspaceAlignment;
  return LB2_OK;
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
                                const lb2_cuda_device* device, lb2_cuda_plan* out) {
  LB2_RETURN_IF_ERROR(lb2::check_layer(args));
  LB2_RETURN_IF_ERROR(lb2::cuda::check_device(device));
  if (out == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "plan must not be NULL");
  if (out->struct_size != sizeof(lb2_cuda_plan))
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT,
                     "plan->struct_size must equal sizeof(lb2_cuda_plan) = %zu, got %" PRIu64,
                     sizeof(lb2_cuda_plan), out->struct_size);
  lb2::cuda::Plan plan;
  LB2_RETURN_IF_ERROR(lb2::cuda::make_plan(*args, activation, *device, &plan));
  *out = {};
  out->struct_size = sizeof *out;
  out->workspace_bytes = plan.workspace_bytes;
  out->token_block = plan.token_block;
  out->macs = lb2::count_macs(*args, plan.first);
  out->activation = plan.activation;
  out->one_bit_mma = lb2::cuda::is_one_bit(plan.activation);
  out->num_stages = plan.num_stages;
  out->first_stages = plan.first.num_groups;
  for (int i = 0; i < plan.num_stages; ++i) out->stages[i] = plan.stages[i];
  return LB2_OK;
}
