#include "cuda/plan/plan.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <type_traits>

#include "core/check.h"
#include "core/status.h"
#include "cuda/decode/sizes.h"
#include "cuda/plan/check.h"
#include "cuda/plan/estimate.h"
#include "cuda/plan/fused.h"
#include "cuda/plan/gemm.h"

namespace lb2::cuda {
namespace {

// From 100 on, the compiler emulates 1-bit MMAs with integer instructions (seen in the machine code of
// CUDA 13.0).
constexpr int32_t kLastOneBitCapability = 99;

constexpr int64_t kTokenBlock = 128;        // bounds the workspace
constexpr int64_t kChunkBytes = 96 * 1024;  // of staged activations: two blocks fit on an SM of sm_90

// Blocks of one token that are on an SM at once: the registers of the plain kernels decide (decode/plain.h).
int64_t blocks_at_once(lb2_activation activation, int32_t capability) {
  return has_three_blocks(activation) && capability <= kLastOneBitCapability ? 3 : 2;
}

// Estimated cycles of a stage for one token, from the wait for the kernel before on: what `python -m
// benchmarks sass-path` counts in the machine code of sm_90. Only the order of estimates matters here.
int64_t estimated_cycles(const Work& work, int row_warps, int64_t splits, int64_t slots) {
  constexpr int64_t kRead = 450;           // until the first activations and scales have arrived
  constexpr int64_t kStageSlice = 500;     // per slice of a warp
  constexpr int64_t kMultiplySlice = 155;  // of the first two of a warp, whose signs are there before
  constexpr int64_t kLaterSlice = 420;
  constexpr int64_t kFinish = 490;       // adding and storing the sums of the warps
  constexpr int64_t kReadPart = 300;     // by the next stage, of each part after those that it reads together
  constexpr int64_t kPartsTogether = 2;  // add_parts in decode/plain.h
  const int64_t blocks = work.row_tiles(kTileRows * row_warps) * splits;
  const int64_t slices = divide_up(work.block_slices(), splits);
  const int64_t items = divide_up(slices, kWarps / row_warps), ready = std::min<int64_t>(items, 2);
  return divide_up(blocks, slots) * (kRead + divide_up(slices, kWarps) * kStageSlice +
                                     ready * kMultiplySlice + (items - ready) * kLaterSlice + kFinish) +
         std::max<int64_t>(0, splits - kPartsTogether) * kReadPart;
}

// The number that tuning asks for, or the range to choose from.
struct Range {
  int64_t least, most;
  Range(int32_t wanted, int64_t largest)
      : least(wanted != 0 ? wanted : 1), most(wanted != 0 ? wanted : largest) {}
};

// Row warps and splits of a stage, what one token costs with them, and how many blocks that are.
struct Blocks {
  int32_t row_warps, splits;
  int64_t cycles, count;
};

// All that tuning allows.
struct Choices {
  int count = 0;
  Blocks all[4 * 6];  // 1 to kWarps row warps, 1 to kMostSplits splits, each a power of two
};

Choices choices_of(const Work& work, int64_t slots, int32_t wanted_row_warps, int32_t wanted_splits) {
  const Range warps(wanted_row_warps, kWarps);
  const Range parts(wanted_splits, work.last ? 1 : std::min(work.block_slices(), kMostSplits));
  Choices choices;
  for (int64_t row_warps = warps.least; row_warps <= warps.most; row_warps *= 2)
    for (int64_t splits = parts.least; splits <= parts.most; splits *= 2)
      choices.all[choices.count++] = {static_cast<int32_t>(row_warps), static_cast<int32_t>(splits),
                                      estimated_cycles(work, static_cast<int>(row_warps), splits, slots),
                                      work.row_tiles(kTileRows * row_warps) * splits};
  return choices;
}

// The shapes of all stages together. Independent of the number of tokens, because they decide the order of
// summation. The blocks of a chained stage start early where there is room for them beside those of the stage
// before. Of equal choices the one with the fewest blocks is taken, as each converts activations anew, but
// rather more than fewer than the GPU has SMs.
void choose_shapes(const Stages& stages, const lb2_cuda_tuning& tuning, const Plan& plan, Blocks (&best)[2]) {
  constexpr int64_t kLate = 1000;  // what comes before the wait, of blocks that cannot start early
  const int64_t multiprocessors = plan.device.multiprocessors;
  const int64_t slots = blocks_at_once(plan.activation, plan.device.capability) * multiprocessors;
  Choices choices[2];
  for (int s = 0; s < stages.count; ++s) {
    const Work& work = stages.work[s];
    choices[s] = choices_of(work, slots, tuning.row_warps[work.stage], work.last ? 0 : tuning.splits);
  }
  const Blocks none = {};
  int64_t least[3] = {INT64_MAX, 0, 0};
  for (int i = 0; i < choices[0].count; ++i)
    for (int j = 0; j < std::max(1, choices[1].count); ++j) {
      const Blocks& first = choices[0].all[i];
      const Blocks& last = stages.count == 2 ? choices[1].all[j] : none;
      const bool late = is_chained(plan, tuning) && first.count + last.count > slots;
      const int64_t cost[3] = {first.cycles + last.cycles + late * kLate,
                               std::max(first.count, multiprocessors) + std::max(last.count, multiprocessors),
                               -(first.count + last.count)};
      if (!std::lexicographical_compare(cost, cost + 3, least, least + 3)) continue;
      std::copy(cost, cost + 3, least);
      best[0] = first;
      best[1] = last;
    }
}

int token_tile(int64_t tokens) {
  for (const int tile : kTokenTiles)
    if (tokens <= tile) return tile;
  return kMaxTokenTile;
}

// Sets the fields that depend on the number of tokens: tile, grid_z, chunk and shared memory.
void fit_tokens(lb2_activation activation, int64_t tokens, int64_t slices, int64_t shared_bytes,
                int32_t max_chunk, bool normed, lb2_cuda_launch* launch) {
  launch->token_tile = token_tile(tokens);
  launch->grid_z = static_cast<int32_t>(std::max<int64_t>(1, divide_up(tokens, launch->token_tile)));
  const int64_t slice = slice_bytes(activation, launch->token_tile);
  const bool squares = normed && !converts_ahead(launch->token_tile);
  const int64_t sums = sums_bytes(launch->token_tile) + (squares ? squares_bytes(launch->token_tile) : 0);
  const int64_t room = std::min(kChunkBytes, shared_bytes - sums) / slice;
  const int64_t wanted = max_chunk != 0 ? std::min<int64_t>(max_chunk, room) : room;
  const int64_t chunk = std::max<int64_t>(1, std::min(wanted, divide_up(slices, launch->grid_y)));
  launch->chunk_slices = static_cast<int32_t>(chunk);
  launch->shared_bytes = static_cast<int32_t>(chunk * slice + sums);
}

// Adds the launches of a stage and their part of the workspace.
void add_stage(const Work& work, const Blocks& blocks, const lb2_cuda_tuning& tuning, bool normed,
               Plan* plan) {
  const int32_t chained = is_chained(*plan, tuning);
  lb2_cuda_launch decode = {};
  decode.kind = LB2_CUDA_DECODE;
  decode.stage = work.stage;
  decode.threads = kThreads;
  decode.chained = chained;
  decode.estimated_cycles = cap_cycles(blocks.cycles);
  decode.row_warps = blocks.row_warps;
  decode.split_warps = kWarps / blocks.row_warps;
  decode.grid_x = static_cast<int32_t>(work.row_tiles(kTileRows * blocks.row_warps));
  decode.grid_y = blocks.splits;
  fit_tokens(plan->activation, plan->token_block, work.block_slices(), plan->device.shared_bytes,
             tuning.max_chunk, normed, &decode);
  if (converts_ahead(decode.token_tile)) {
    lb2_cuda_launch convert = {};
    convert.kind = LB2_CUDA_CONVERT;
    convert.stage = work.stage;
    // Warps after the last slice have the norms.
    convert.grid_x =
        static_cast<int32_t>(divide_up((work.all_slices() + normed) * decode.token_tile, kWarps));
    convert.grid_y = 1;
    convert.grid_z = decode.grid_z;
    convert.threads = kThreads;
    convert.token_tile = decode.token_tile;
    convert.chained = chained;
    plan->launches[plan->num_launches++] = convert;
    const int64_t slice = slice_bytes(plan->activation, decode.token_tile);
    for (int i = 0; i < work.num_terms; ++i) {
      plan->converted_offset[work.stage][i] = plan->workspace_bytes;
      plan->workspace_bytes += align_bytes(decode.grid_z * work.slices(i) * slice);
    }
    if (normed) {
      plan->normed_offset = plan->workspace_bytes;
      plan->workspace_bytes += align_bytes(plan->token_block * 4);
    }
  }
  plan->launches[plan->num_launches++] = decode;
  if (work.last) return;
  plan->sum_parts = decode.grid_y;
  for (int i = 0; i < work.num_groups; ++i) {
    plan->sums_offset[i] = plan->workspace_bytes;
    plan->workspace_bytes += align_bytes(decode.grid_y * plan->token_block * work.rows[i] * 4);
  }
}

lb2_status resolve_activation(const CallShape& call, const lb2_cuda_device& device,
                              lb2_activation* activation) {
  if (*activation < LB2_ACTIVATION_AUTO || *activation > LB2_ACTIVATION_FLOAT16)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "activation must be LB2_ACTIVATION_AUTO (0), _EXACT (1), _INT16 (2), _INT8 (3), _SIGN (4) or "
                "_FLOAT16 (5), got %" PRId32,
                *activation);
  if (*activation != LB2_ACTIVATION_AUTO) return LB2_OK;
  const bool one_bit = device.capability <= kLastOneBitCapability;
  *activation = call.dtype == LB2_FLOAT32            ? LB2_ACTIVATION_EXACT
                : one_bit && call.m <= kMaxTokenTile ? LB2_ACTIVATION_INT16
                                                     : LB2_ACTIVATION_FLOAT16;
  return LB2_OK;
}

}  // namespace

lb2_status make_plan(const CallShape& call, lb2_activation activation, const lb2_cuda_device& device,
                     const lb2_cuda_tuning* given, Plan* plan) noexcept {
  *plan = {};
  LB2_RETURN_IF_ERROR(resolve_activation(call, device, &activation));
  const lb2_cuda_tuning tuning = given != nullptr ? *given : lb2_cuda_tuning{};
  LB2_RETURN_IF_ERROR(
      check_tuning(tuning, activation, call.single_stage ? 1 : divide_up(call.k, kSliceCols)));
  plan->struct_size = sizeof(lb2_cuda_plan);
  plan->device = device;
  plan->activation = activation;
  plan->one_bit_mma = is_one_bit(activation);
  plan->first_stages = call.first.num_groups;
  plan->macs = call.macs;
  const Stages stages = find_stages(call);
  if (uses_gemm(activation, call.m, device.shared_bytes)) {
    Plan fused = *plan;
    const bool fits = add_fused_launch(stages, call.m, tuning, &fused);
    if (fits) estimate_call(stages, call.m, call.dtype, &fused);
    if (tuning.fused > 0 && !fits)
      return fail(
          LB2_ERROR_UNSUPPORTED,
          "tuning->fused must be -1 or 0, as layers of these ranks and sizes do not fit into one kernel "
          "with clusters of that many blocks on a GPU of capability %" PRId32 " with %" PRId64
          " bytes of shared memory, got %" PRId32,
          device.capability, device.shared_bytes, tuning.fused);
    if (tuning.fused <= 0) {
      add_gemm_launches(stages, call.m, tuning, plan);
      plan->workspace_bytes += kWorkspaceAlignment;
      estimate_call(stages, call.m, call.dtype, plan);
    }
    if (tuning.fused > 0 || (fits && fused.estimated_cycles < plan->estimated_cycles)) *plan = fused;
    if (call.normed && call.m > 0) {
      int64_t bytes;
      if (__builtin_mul_overflow(call.m, 4 * call.k, &bytes) || bytes > INT64_MAX / 2)
        return fail(LB2_ERROR_UNSUPPORTED, "m * k must be at most %" PRId64 ", got m=%" PRId64 ", k=%" PRId64,
                    INT64_MAX / 8, call.m, call.k);
      // A plan without launches of ours needs no other workspace, and no room to align it.
      if (plan->workspace_bytes == 0) plan->workspace_bytes = kWorkspaceAlignment;
      plan->normed_offset = plan->workspace_bytes - kWorkspaceAlignment;
      plan->workspace_bytes += align_bytes(bytes);
    }
    return LB2_OK;
  }
  plan->token_block = std::min(call.m, kTokenBlock);
  Blocks blocks[2];
  choose_shapes(stages, tuning, *plan, blocks);
  for (int i = 0; i < stages.count; ++i)
    add_stage(stages.work[i], blocks[i], tuning, call.normed && i == 0, plan);
  if (plan->workspace_bytes > 0) plan->workspace_bytes += kWorkspaceAlignment;
  return LB2_OK;
}

lb2_status plan_call(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m, lb2_dtype dtype,
                     lb2_activation activation, const lb2_cuda_device* device, const lb2_cuda_tuning* tuning,
                     bool normed, Plan* plan) noexcept {
  CallShape call;
  LB2_RETURN_IF_ERROR(gather_shapes(shapes, num_layers, m, dtype, &call));
  LB2_RETURN_IF_ERROR(check_device(device));
  if (tuning != nullptr && tuning->struct_size != sizeof(lb2_cuda_tuning))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "tuning->struct_size must equal sizeof(lb2_cuda_tuning) = %zu, got %" PRIu64,
                sizeof(lb2_cuda_tuning), tuning->struct_size);
  call.normed = normed;
  return make_plan(call, activation, *device, tuning, plan);
}

lb2_status resume_plan(const CallShape& call, const lb2_cuda_plan* made, Plan* plan) noexcept {
  LB2_RETURN_IF_ERROR(check_plan_struct(made));
  LB2_RETURN_IF_ERROR(check_device(&made->device));
  // Plan again with the choices of `made`: it was made for this call if the same plan comes out.
  lb2_cuda_tuning tuning = {};
  tuning.unchained = !made->launches[0].chained;
  read_gemm_tuning(*made, &tuning);
  read_fused_tuning(*made, &tuning);
  for (const lb2_cuda_launch& launch : made->launches) {
    if (launch.kind != LB2_CUDA_DECODE) continue;
    tuning.row_warps[launch.stage == 1] = launch.row_warps;
    if (!call.single_stage && launch.stage == 0) tuning.splits = launch.grid_y;
    tuning.max_chunk = std::max(tuning.max_chunk, launch.chunk_slices);
  }
  const bool planned = make_plan(call, made->activation, made->device, &tuning, plan) == LB2_OK;
  // Every member is an integer, and there is no padding: equal plans are equal bytes.
  static_assert(std::has_unique_object_representations_v<lb2_cuda_plan>);
  if (planned && std::memcmp(static_cast<const lb2_cuda_plan*>(plan), made, sizeof *made) == 0) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "plan must be what was made for the sizes and paths of this call (layers=%" PRId32
              ", m=%" PRId64 ", k=%" PRId64 ", n=%" PRId64 ", num_paths=%" PRId32 "), got one that differs",
              call.num_layers, call.m, call.k, call.n[0], call.num_paths);
}

lb2_cuda_launch launch_for(const Plan& plan, int index, int64_t tokens) noexcept {
  lb2_cuda_launch launch = plan.launches[index];
  launch.grid_z = static_cast<int32_t>(divide_up(tokens, launch.token_tile));
  return launch;
}

namespace {

// The parameters that decode and GEMM launches have in common.
void fill_params(const Layers& layers, const Plan& plan, int index, int64_t first, int64_t tokens,
                 char* workspace, LaunchParams* params) noexcept {
  const lb2_cuda_launch& launch = plan.launches[index];
  const lb2_linear_args& args = layers.front();
  const bool reads_input = launch.stage == 0, last = launch.stage == 1 || layers.shape.single_stage;
  const int64_t element_bytes = lb2::element_bytes(args.dtype);
  // Rows per block; 0 in launches that convert.
  const int64_t tile_rows = launch.row_tile > 0 ? launch.row_tile : kTileRows * launch.row_warps;
  params->input_dtype = reads_input ? layers.input_dtype : LB2_FLOAT32;
  params->output_dtype = last ? args.dtype : LB2_FLOAT32;
  params->num_parts = reads_input ? 1 : static_cast<int32_t>(plan.sum_parts);
  params->m = static_cast<int32_t>(tokens);
  params->splits = launch.grid_y;
  const auto sums_of = [&](int stage) {
    return reinterpret_cast<float*>(workspace + plan.sums_offset[stage]);
  };
  int32_t tiles = 0;
  const auto add_group = [&](int64_t rows) -> Group& {
    Group& group = params->groups[params->num_groups++];
    group.rows = static_cast<int32_t>(rows);
    group.first_tile = tiles;
    group.first_term = group.last_term = params->num_terms;
    if (tile_rows > 0) tiles += static_cast<int32_t>(divide_up(rows, tile_rows));
    return group;
  };
  // Adds path p to the last group.
  const auto add_term = [&](int p) {
    const lb2_path& path = *layers.paths[p];
    Term& term = params->terms[params->num_terms];
    term.row_scale = last ? path.out_scale : nullptr;
    term.converted =
        reinterpret_cast<unsigned char*>(workspace) + plan.converted_offset[launch.stage][params->num_terms];
    if (reads_input) {
      term.input = static_cast<const char*>(layers.input) +
                   first * layers.input_stride * lb2::element_bytes(layers.input_dtype);
      term.input_stride = layers.input_stride;
      term.scale = path.in_scale;
      term.words = reinterpret_cast<const uint32_t*>(path.v);
      term.word_stride = path.v_stride;
      term.cols = static_cast<int32_t>(args.k);
    } else {
      term.input = sums_of(layers.shape.first.group_of[p]);
      term.input_stride = path.rank;
      term.part_stride = tokens * path.rank;
      term.scale = path.latent_scale;
      term.words = reinterpret_cast<const uint32_t*>(path.u);
      term.word_stride = path.u_stride;
      term.cols = static_cast<int32_t>(path.rank);
    }
    term.slices = static_cast<int32_t>(divide_up(term.cols, kSliceCols));
    params->groups[params->num_groups - 1].last_term = ++params->num_terms;
  };
  if (!last) {
    const FirstStages& stages = layers.shape.first;
    for (int g = 0; g < stages.num_groups; ++g) {
      const int leader = stages.leader_of[g];
      Group& group = add_group(layers.paths[leader]->rank);
      group.output = sums_of(g);
      group.output_stride = group.rows;
      add_term(leader);
    }
    return;
  }
  for (int32_t i = 0; i < layers.shape.num_layers; ++i) {
    const lb2_linear_args& layer = layers.args[i];
    Group& group = add_group(layer.n);
    group.output = static_cast<char*>(layer.output) + first * layer.output_stride * element_bytes;
    group.output_stride = layer.output_stride;
    group.bias = layer.bias;
    for (int32_t p = layers.shape.first_path[i]; p < layers.shape.first_path[i + 1]; ++p) add_term(p);
  }
}

}  // namespace

bool is_decode(const lb2_cuda_plan& plan) noexcept { return !is_gemm(plan) && !is_fused(plan); }

namespace {

void add_first_extras(const Layers& layers, const Plan& plan, int64_t first, char* workspace,
                      Extras* extras) {
  const CallExtras& call = layers.extras;
  if (call.norm != nullptr) {
    extras->factor = call.norm->weight;
    extras->factor_dtype = call.norm->dtype;
    extras->factor_offset = call.norm->offset;
    extras->normed = 1;
    extras->eps = call.norm->eps;
    extras->norms = reinterpret_cast<float*>(workspace + plan.normed_offset);
  } else if (call.factor != nullptr) {
    const int64_t bytes = first * call.factor_stride * lb2::element_bytes(layers.shape.dtype);
    extras->factor = static_cast<const char*>(call.factor) + bytes;
    extras->factor_stride = call.factor_stride;
    extras->factor_dtype = layers.shape.dtype;
  }
}

void add_last_extras(const Layers& layers, int64_t first, Extras* extras) {
  const CallExtras& call = layers.extras;
  extras->function = call.function;
  extras->function_rows = call.function_rows;
  if (call.residual == nullptr) return;
  const int64_t bytes = first * call.residual_stride * lb2::element_bytes(layers.shape.dtype);
  extras->residual = static_cast<const char*>(call.residual) + bytes;
  extras->residual_stride = call.residual_stride;
}

}  // namespace

DecodeParams decode_params(const Layers& layers, const Plan& plan, int index, int64_t first, int64_t tokens,
                           char* workspace) noexcept {
  const lb2_cuda_launch& launch = plan.launches[index];
  DecodeParams params = {};
  fill_params(layers, plan, index, first, tokens, workspace, &params);
  while (launch.row_warps > 1 << params.row_warps_log2) ++params.row_warps_log2;
  for (int i = 0; launch.kind == LB2_CUDA_DECODE && i < params.num_groups; ++i) {
    Group& group = params.groups[i];
    int32_t slices = 0;
    for (int term = group.first_term; term < group.last_term; ++term) slices += params.terms[term].slices;
    group.part_slices = slices / launch.grid_y;
    group.part_rest = slices % launch.grid_y;
  }
  params.chunk_slices = launch.chunk_slices;
  const bool last = launch.stage == 1 || layers.shape.single_stage;
  if (launch.stage == 0) add_first_extras(layers, plan, first, workspace, &params.extras);
  if (last) add_last_extras(layers, first, &params.extras);
  return params;
}

LaunchParams gemm_params(const Layers& layers, const Plan& plan, int index, int64_t first, int64_t tokens,
                         char* workspace) noexcept {
  LaunchParams params = {};
  fill_params(layers, plan, index, first, tokens, workspace, &params);
  return params;
}

char* align_workspace(void* workspace) noexcept {
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  return static_cast<char*>(workspace) +
         (kWorkspaceAlignment - address % kWorkspaceAlignment) % kWorkspaceAlignment;
}

}  // namespace lb2::cuda

lb2_status lb2_projections_plan_cuda(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m,
                                     lb2_dtype dtype, lb2_activation activation,
                                     const lb2_cuda_device* device, const lb2_cuda_tuning* tuning,
                                     int32_t normed, lb2_cuda_plan* out) {
  lb2::cuda::Plan plan;
  LB2_RETURN_IF_ERROR(lb2::cuda::check_plan_struct(out));
  LB2_RETURN_IF_ERROR(
      lb2::cuda::plan_call(shapes, num_layers, m, dtype, activation, device, tuning, normed != 0, &plan));
  *out = plan;
  return LB2_OK;
}

lb2_status lb2_grouped_plan_cuda(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m,
                                 lb2_dtype dtype, lb2_activation activation, const lb2_cuda_device* device,
                                 const lb2_cuda_tuning* tuning, lb2_cuda_plan* out) {
  return lb2_projections_plan_cuda(shapes, num_layers, m, dtype, activation, device, tuning, 0, out);
}

lb2_status lb2_linear_plan_cuda(const lb2_layer_shape* shape, int64_t m, lb2_dtype dtype,
                                lb2_activation activation, const lb2_cuda_device* device,
                                const lb2_cuda_tuning* tuning, lb2_cuda_plan* out) {
  return lb2_grouped_plan_cuda(shape, 1, m, dtype, activation, device, tuning, out);
}
