#include "cuda/decode/plain_params.h"
#include "cuda/decode/sizes.h"
#include "littlebit2/cuda.h"

namespace lb2::cuda {
namespace {

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool has_extras(const Extras& extras) {
  return extras.factor != nullptr || extras.normed || extras.function_rows > 0 || extras.residual != nullptr;
}

bool is_plain(const DecodeParams& params, const Group& group, const Term& term, int64_t element_bytes) {
  const int64_t input_bytes = term.input_stride * element_bytes,
                part_bytes = term.part_stride * element_bytes;
  const int64_t reach = (params.m - 1) * input_bytes + (params.num_parts - 1) * part_bytes;
  return term.cols % 8 == 0 && is_aligned(term.words) && term.word_stride % 4 == 0 &&
         is_aligned(term.scale) && is_aligned(term.input) && (params.m == 1 || input_bytes % 16 == 0) &&
         (params.num_parts == 1 || part_bytes % 16 == 0) && group.rows * term.word_stride <= INT32_MAX / 4 &&
         reach + term.cols * element_bytes <= INT32_MAX && input_bytes <= INT32_MAX;
}

}  // namespace

bool plain_params(const lb2_cuda_launch& launch, const DecodeParams& params, PlainParams* plain) noexcept {
  if (launch.kind != LB2_CUDA_DECODE || has_extras(params.extras) || params.num_terms > kPlainTerms)
    return false;
  // A call of more tokens than a tile goes in rounds, which share what a launch has converted.
  if (converts_ahead(launch.token_tile) && params.m > launch.token_tile) return false;
  const int64_t element_bytes = params.input_dtype == LB2_FLOAT32 ? 4 : 2;
  *plain = {};
  plain->num_groups = params.num_groups;
  plain->num_parts = params.num_parts;
  plain->m = params.m;
  plain->row_warps_log2 = params.row_warps_log2;
  plain->signs_early = params.signs_early;
  plain->partial_offset = launch.shared_bytes - sums_bytes(launch.token_tile);
  plain->input_dtype = params.input_dtype;
  plain->output_dtype = params.output_dtype;
  for (int g = 0; g < params.num_groups; ++g) {
    const Group& group = params.groups[g];
    // The kernel reads 16 bytes of the first row for what is not there.
    if (group.rows < 2) return false;
    const int64_t items = group.part_slices + (group.part_rest > 0);
    if (items > params.chunk_slices) return false;
    const int64_t turns = params.input_dtype == LB2_FLOAT32 ? kPlainTurns : kPlainTurnsOfHalves;
    if (converts_ahead(launch.token_tile) && items * launch.token_tile > turns * kWarps) return false;
    plain->groups[g] = group;
    for (int i = group.first_term; i < group.last_term; ++i) {
      const Term& term = params.terms[i];
      if (!is_plain(params, group, term, element_bytes)) return false;
      plain->terms[i] = {static_cast<const char*>(term.input),
                         term.scale,
                         term.words,
                         term.row_scale,
                         static_cast<int32_t>(term.word_stride),
                         params.m == 1 ? 0 : static_cast<int32_t>(term.input_stride * element_bytes),
                         params.num_parts == 1 ? 0 : static_cast<int32_t>(term.part_stride * element_bytes),
                         term.cols,
                         term.slices};
    }
  }
  return true;
}

bool next_decode_launch(const Layers& layers, const Plan& plan, int index, int64_t first, int64_t tokens,
                        bool queued, char* workspace, DecodeLaunch* next) noexcept {
  const auto fill = [&](int i) {
    next->launch = launch_for(plan, i, tokens);
    next->params = decode_params(layers, plan, i, first, tokens, workspace);
    // Launches after the first are of a kernel of ours, which writes neither signs nor scales.
    next->params.signs_early = queued || layers.extras.after_own;
    // Rounds of a call share their launches.
    const bool may_convert = !converts_ahead(next->launch.token_tile) || tokens == layers.shape.m;
    next->is_plain = may_convert && plain_params(next->launch, next->params, &next->plain);
  };
  if (plan.launches[index].kind == LB2_CUDA_CONVERT) {
    fill(index + 1);
    if (next->is_plain) return false;
  }
  fill(index);
  return true;
}

}  // namespace lb2::cuda
