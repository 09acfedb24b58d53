#include "cpu/portable/plan.h"

#include <algorithm>

namespace lb2::cpu {
namespace {

// The rows of a block may take half of a common L2 cache; the packed words stream through the other half.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kTokenStep = 24;  // a multiple of every ISA's token tile
constexpr int64_t kAlignment = 64;

int64_t padded_columns(int64_t cols) { return lb2_words_per_row(cols) * LB2_WORD_BITS; }

// Chooses the block of tokens so that its rows fit the cache, then places the row buffers one after another.
void lay_out(int64_t m, int num_inputs, int num_latents, Plan& plan) {
  int64_t floats_per_token = 0;
  for (int i = 0; i < num_inputs; ++i) floats_per_token += plan.inputs[i].stride;
  for (int i = 0; i < num_latents; ++i) floats_per_token += plan.latents[i].stride;
  const int64_t fitting = kBlockBytes / (floats_per_token * 4) / kTokenStep * kTokenStep;
  plan.token_block = std::min(m, std::clamp(fitting, kTokenStep, kMaxTokenBlock));
  int64_t offset = 0;
  for (int i = 0; i < num_inputs; ++i) {
    plan.inputs[i].offset = offset;
    offset += plan.inputs[i].stride * plan.token_block;
  }
  for (int i = 0; i < num_latents; ++i) {
    plan.latents[i].offset = offset;
    offset += plan.latents[i].stride * plan.token_block;
  }
  plan.workspace_bytes = offset == 0 ? 0 : offset * 4 + kAlignment;
}

}  // namespace

Plan plan_forward(const lb2_layer_shape& shape, int64_t m) noexcept {
  Plan plan = {};
  static_cast<FirstStages&>(plan) = find_first_stages(shape);
  for (int g = 0; g < plan.num_groups; ++g) plan.inputs[g].stride = padded_columns(shape.k);
  const int num_latents = shape.single_stage ? 0 : static_cast<int>(shape.num_paths);
  for (int p = 0; p < num_latents; ++p) plan.latents[p].stride = padded_columns(shape.ranks[p]);
  lay_out(m, plan.num_groups, num_latents, plan);
  return plan;
}

Plan plan_backward(const lb2_layer_shape& shape, int64_t m) noexcept {
  Plan plan = {};
  static_cast<FirstStages&>(plan) = find_first_stages(shape);
  const int num_paths = static_cast<int>(shape.num_paths);
  for (int p = 0; p < num_paths; ++p) plan.inputs[p].stride = padded_columns(shape.n);
  const int num_latents = shape.single_stage ? 0 : plan.num_groups;
  for (int g = 0; g < num_latents; ++g)
    plan.latents[g].stride = padded_columns(shape.ranks[plan.leader_of[g]]);
  lay_out(m, num_paths, num_latents, plan);
  return plan;
}

}  // namespace lb2::cpu
