#include "cuda/plan/fused.h"

#include <algorithm>

#include "cuda/plan/check.h"
#include "cuda/plan/gemm.h"

namespace lb2::cuda {
namespace {

constexpr int64_t kMostTokens = 16384;  // tokens per launch
constexpr int64_t kGpcBlocks = 16;      // fewest SMs per GPC; a cluster lies in one GPC
constexpr int64_t kMostRows = 4096;     // of all first stages; more than fits into any shared memory

// The latents in shared memory.
struct Layout {
  int rows[kFusedPaths];     // first row of each first stage
  int offsets[kFusedPaths];  // of the converted latents of each term, in bytes
  int pitch, latent_bytes;
  // The parts that a block keeps: one per slice of its own, or, for a single block, the sum of all.
  int64_t part_bytes(int64_t slices, int64_t blocks) const {
    return (blocks == 1 ? 1 : divide_up(slices, blocks)) * kFusedTokens * pitch * 4;
  }
};

int64_t last_indices(int64_t rank) {
  return divide_up(rank - (divide_up(rank, kSliceCols) - 1) * kSliceCols, kIndexCols);
}

// Returns false for layers that do not fit on any GPU.
bool lay_out(const Stages& stages, lb2_activation activation, Layout* layout) {
  const Work &first = stages.work[0], &last = stages.work[1];
  if (stages.count != 2 || first.num_groups > kFusedPaths || last.num_terms > kFusedPaths) return false;
  int64_t rows = 0, bytes = 0;
  for (int g = 0; g < first.num_groups; ++g) {
    layout->rows[g] = static_cast<int>(rows);
    rows += divide_up(first.rows[g], kTileRows) * kTileRows;
  }
  if (rows > kMostRows) return false;
  for (int i = 0; i < last.num_terms; ++i) {
    layout->offsets[i] = static_cast<int>(bytes);
    bytes += (last.slices(i) - 1) * fused_buffer_bytes(activation) +
             kFusedGroups * (last_indices(last.cols[i]) * fused_index_bytes(activation) + kGemmTailBytes);
  }
  layout->pitch = static_cast<int>(rows) + 4;  // bank conflicts
  layout->latent_bytes = static_cast<int>(bytes);
  return true;
}

// Estimated cycles of the kernel. From instruction counts, like those of the GEMM, with which they are
// compared.
int64_t estimated_cycles(const Stages& stages, int64_t tokens, int64_t blocks, const Layout& layout,
                         const Plan& plan) {
  constexpr int64_t kBegin = 1500;     // until the first slice is converted
  constexpr int64_t kConvert = 220;    // of a scheduler, per slice of a token
  constexpr int64_t kMoved = 35;       // of the load/store path of the SM, per slice of a token
  constexpr int64_t kLoad = 4;         // of the same, per 16-byte load of a warp
  constexpr int64_t kSigns = 32;       // of a scheduler, per tile of rows and step
  constexpr int64_t kItem = 300;       // a barrier, scales, sums stored
  constexpr int64_t kLatents = 600;    // of a warp, per slice of a token, besides reading parts
  constexpr int64_t kReadParts = 400;  // four at once
  constexpr int64_t kCluster = 500;    // a cluster barrier
  constexpr int64_t kShare = 300;      // sending latents to the other blocks
  constexpr int64_t kUnit = 400;       // storing the outputs of a warp
  constexpr int64_t kSchedulers = 4;
  const Work &first = stages.work[0], &last = stages.work[1];
  const lb2_activation mode = plan.activation;
  const int64_t steps = gemm_steps(mode), terms = gemm_terms(mode);
  const int64_t tile_mmas = kFusedGroups * 2 * terms;  // of a step
  const int64_t mma = mma_cycles(mode, plan.device.capability);
  const int64_t all_slices = first.slices(0), slices = divide_up(all_slices, blocks);

  int64_t cycles = kBegin, sign_bytes = 0;
  for (int g = 0; g < first.num_groups; ++g) {
    const int64_t chunks = divide_up(first.rows[g], kFusedChunkRows);
    const int64_t conversions = blocks == 1 ? chunks : 1;
    const int64_t tiles = divide_up(divide_up(first.rows[g], kTileRows), kSchedulers);
    const int64_t warps = std::min<int64_t>(divide_up(first.rows[g], kTileRows), chunks * kWarps);
    const int64_t multiply = tiles * steps * tile_mmas * mma;
    const int64_t issue =
        tiles * steps * kSigns + conversions * kFusedTokens / kSchedulers * kConvert * (1 + terms) / 2;
    const int64_t loads = warps * steps * kFusedGroups * terms * kLoad + conversions * kFusedTokens * kMoved;
    cycles += slices * (chunks * kItem + std::max({multiply, issue, loads}));
    sign_bytes += first.rows[g] * first.cols[g] / 8;
  }
  const int64_t parts = blocks == 1 ? 1 : all_slices;
  const int64_t latents = divide_up(kFusedTokens / blocks * last.all_slices(), kWarps);
  cycles += latents * (kLatents + divide_up(parts, 4) * kReadParts);
  if (blocks > 1) cycles += 2 * kCluster + kShare * divide_up(layout.latent_bytes, 32 * 1024);

  const int64_t units = divide_up(last.row_tiles(kFusedUnitRows), blocks);
  const int64_t rounds = divide_up(units, kWarps), at_once = divide_up(std::min<int64_t>(units, kWarps), 4);
  const int64_t index_steps = steps / kSliceIndices;
  cycles += rounds * (kUnit + last.most_parts(kIndexCols) * index_steps *
                                  std::max(at_once * kFusedRowTiles * std::max(tile_mmas * mma, kSigns),
                                           terms * kStepLatency));
  for (int g = 0; g < last.num_groups; ++g)
    for (int i = last.first_term[g]; i < last.first_term[g + 1]; ++i)
      sign_bytes += last.rows[g] * last.cols[i] / 8;

  const int64_t tiles = divide_up(tokens, kFusedTokens), sms = plan.device.multiprocessors;
  const int64_t in_gpcs = sms / kGpcBlocks * (kGpcBlocks / blocks);
  const int64_t at_a_time = blocks <= 2 || sms < kGpcBlocks ? sms / blocks : in_gpcs;
  return std::max(divide_up(tiles, at_a_time) * cycles, tiles * sign_bytes / kL2Bytes);
}

}  // namespace

bool add_fused_launch(const Stages& stages, int64_t tokens, const lb2_cuda_tuning& tuning,
                      Plan* plan) noexcept {
  Layout layout;
  if (tuning.fused < 0 || (tuning.fused == 0 && asks_for_gemm(tuning))) return false;
  if (!lay_out(stages, plan->activation, &layout)) return false;
  const int64_t token_block = std::min(tokens, kMostTokens);
  lb2_cuda_launch launch = {};
  int64_t best = INT64_MAX;
  for (int blocks = 1; blocks <= kFusedMostBlocks; blocks *= 2) {
    if (tuning.fused != 0 && tuning.fused != blocks) continue;
    if (blocks > 1 && plan->device.capability < kLeastChained) break;
    if (blocks > plan->device.multiprocessors) break;  // they run at the same time
    const int64_t part_bytes = layout.part_bytes(stages.work[0].slices(0), blocks);
    if (part_bytes + layout.latent_bytes > plan->device.shared_bytes) continue;
    const int shared =
        fused_layout(plan->activation, layout.latent_bytes, static_cast<int>(part_bytes)).bytes;
    if (shared > plan->device.shared_bytes) continue;
    const int64_t cycles = estimated_cycles(stages, token_block, blocks, layout, *plan);
    if (cycles >= best) continue;
    best = cycles;
    launch.grid_y = blocks;
    launch.shared_bytes = shared;
    launch.estimated_cycles = cap_cycles(cycles);
  }
  if (best == INT64_MAX) return false;
  launch.kind = LB2_CUDA_FUSED;
  launch.grid_x = 1;
  launch.grid_z = static_cast<int32_t>(divide_up(token_block, kFusedTokens));
  launch.threads = kThreads;
  launch.token_tile = kFusedTokens;
  launch.chained = is_chained(*plan, tuning);
  plan->token_block = token_block;
  plan->launches[plan->num_launches++] = launch;
  return true;
}

bool is_fused(const lb2_cuda_plan& plan) noexcept {
  return plan.num_launches == 1 && plan.launches[0].kind == LB2_CUDA_FUSED;
}

FusedParams fused_params(const Layers& layers, const Plan& plan, int blocks, int64_t first,
                         int64_t tokens) noexcept {
  const lb2_linear_args& args = layers.front();
  const CallShape& call = layers.shape;
  FusedParams params = {};
  Layout layout;
  lay_out(find_stages(call), plan.activation, &layout);
  params.num_firsts = call.first.num_groups;
  for (int g = 0; g < call.first.num_groups; ++g) {
    const lb2_path& path = *layers.paths[call.first.leader_of[g]];
    params.firsts[g] = {path.in_scale, reinterpret_cast<const uint32_t*>(path.v), path.v_stride,
                        static_cast<int32_t>(path.rank), layout.rows[g]};
  }
  const int64_t element_bytes = lb2::element_bytes(args.dtype);
  for (int32_t i = 0; i < call.num_layers; ++i) {
    const lb2_linear_args& layer = layers.args[i];
    Group& group = params.layers[params.num_layers++];
    group.output = static_cast<char*>(layer.output) + first * layer.output_stride * element_bytes;
    group.bias = layer.bias;
    group.output_stride = layer.output_stride;
    group.rows = static_cast<int32_t>(layer.n);
    group.first_tile = params.num_units;
    params.num_units += static_cast<int32_t>(divide_up(layer.n, kFusedUnitRows));
    group.first_term = params.num_terms;
    for (int32_t p = call.first_path[i]; p < call.first_path[i + 1]; ++p) {
      const lb2_path& path = *layers.paths[p];
      params.terms[params.num_terms] = {path.latent_scale,
                                        path.out_scale,
                                        reinterpret_cast<const uint32_t*>(path.u),
                                        path.u_stride,
                                        static_cast<int32_t>(path.rank),
                                        static_cast<int32_t>(divide_up(path.rank, kSliceCols)),
                                        call.first.group_of[p],
                                        layout.offsets[params.num_terms]};
      ++params.num_terms;
    }
    group.last_term = params.num_terms;
  }
  params.input = static_cast<const char*>(layers.input) +
                 first * layers.input_stride * lb2::element_bytes(layers.input_dtype);
  params.input_stride = layers.input_stride;
  params.cols = static_cast<int32_t>(args.k);
  params.slices = static_cast<int32_t>(divide_up(args.k, kSliceCols));
  params.m = static_cast<int32_t>(tokens);
  while (1 << params.blocks_log2 < blocks) ++params.blocks_log2;
  params.part_pitch = layout.pitch;
  const FusedLayout shared = fused_layout(plan.activation, layout.latent_bytes,
                                          static_cast<int>(layout.part_bytes(params.slices, blocks)));
  params.part_offset = shared.part_offset;
  params.store_offset = shared.store_offset;
  params.input_dtype = layers.input_dtype;
  params.output_dtype = args.dtype;
  return params;
}

void read_fused_tuning(const lb2_cuda_plan& made, lb2_cuda_tuning* tuning) noexcept {
  tuning->fused = made.launches[0].kind == LB2_CUDA_FUSED ? made.launches[0].grid_y : -1;
}

}  // namespace lb2::cuda
