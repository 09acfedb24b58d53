// The forward and backward drivers: blocks of tokens, parallel tiles of rows or columns, scales and epilogue.
// Built without ISA flags: all work proportional to the number of weights is in the kernels.
#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "core/check.h"
#include "core/status.h"
#include "cpu/dispatch.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"
#include "cpu/portable/plan.h"

namespace lb2::cpu {
namespace {

// Everything the tasks of one block of tokens need.
struct Block {
  const lb2_linear_args& args;
  const Plan& plan;
  const Kernels& kernels;
  float* workspace;
  int64_t first;   // token
  int64_t tokens;  // of this block

  int64_t element_bytes() const { return lb2::element_bytes(args.dtype); }
  int64_t num_paths() const { return args.num_paths; }
  bool single_stage() const { return args.paths[0].u == nullptr; }
  const char* input_row(int64_t t) const {
    return static_cast<const char*>(args.input) + (first + t) * args.input_stride * element_bytes();
  }
  char* output_at(int64_t t, int64_t column) const {
    return static_cast<char*>(args.output) + ((first + t) * args.output_stride + column) * element_bytes();
  }
  float* input_buffer(int index) const { return workspace + plan.inputs[index].offset; }
  float* latent_buffer(int index) const { return workspace + plan.latents[index].offset; }
};

// The work of a call, `macs` of it per item.
template <typename Body>
lb2_status run_items(const lb2_linear_args& args, int64_t count, int64_t macs, const Body& body) {
  return cpu::run_items(args.parallel_for, args.parallel_context, count, macs, body);
}

int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

SignRows tile_rows(const int32_t* words, int64_t stride, int64_t total, int64_t tile, int64_t cols) {
  const int64_t first = tile * kTileRows;
  const char* start = reinterpret_cast<const char*>(words) + first * stride * 4;
  return {reinterpret_cast<const int32_t*>(start), stride, std::min<int64_t>(kTileRows, total - first),
          lb2_words_per_row(cols)};
}

SignRows tile_columns(const int32_t* words, int64_t stride, int64_t rows, int64_t tile, int64_t cols) {
  const int64_t first_word = tile * (kTileCols / LB2_WORD_BITS);
  const char* start = reinterpret_cast<const char*>(words) + first_word * 4;
  return {reinterpret_cast<const int32_t*>(start), stride, rows, lb2_words_per_row(cols) - first_word};
}

// Runs body(block, group, tile) over the latents of every first stage, `tile_size` of them at a time; `depth`
// is the number of operations for one latent of one token.
template <typename Body>
lb2_status run_group_tiles(const Block& block, int64_t tile_size, int64_t depth, const Body& body) {
  int64_t first_tile[LB2_MAX_PATHS + 1] = {};
  for (int g = 0; g < block.plan.num_groups; ++g)
    first_tile[g + 1] = first_tile[g] + tiles(block.args.paths[block.plan.leader_of[g]].rank, tile_size);
  const auto range = [&](int64_t begin, int64_t end) {
    int group = 0;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= first_tile[group + 1]) ++group;
      body(block, group, i - first_tile[group]);
    }
  };
  return run_items(block.args, first_tile[block.plan.num_groups], tile_size * depth * block.tokens, range);
}

// ---- forward ----

// inputs[g] = x * in_scale
lb2_status scale_inputs(const Block& block) {
  const lb2_linear_args& args = block.args;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int g = 0; g < block.plan.num_groups; ++g) {
        const int64_t stride = block.plan.inputs[g].stride;
        block.kernels.load_scaled(args.dtype, block.input_row(t),
                                  args.paths[block.plan.leader_of[g]].in_scale, args.k, stride,
                                  block.input_buffer(g) + t * stride);
      }
  };
  return run_items(args, block.tokens, args.k * block.plan.num_groups, body);
}

// latents[p] = latent_scale * (V @ inputs[g]) for every path p of group g, one tile of rows of V
void latent_tile(const Block& block, int group, int64_t tile) {
  const lb2_linear_args& args = block.args;
  const lb2_path& leader = args.paths[block.plan.leader_of[group]];
  const SignRows rows = tile_rows(leader.v, leader.v_stride, leader.rank, tile, args.k);
  float dots[kMaxTokenBlock * kTileRows];
  block.kernels.sign_dots(rows, block.input_buffer(group), block.plan.inputs[group].stride, block.tokens,
                          dots);
  for (int p = 0; p < block.num_paths(); ++p) {
    if (block.plan.group_of[p] != group) continue;
    const int64_t stride = block.plan.latents[p].stride;
    for (int64_t r = 0; r < rows.rows; ++r) {
      const float scale = load_scale(args.paths[p].latent_scale, tile * kTileRows + r);
      float* column = block.latent_buffer(p) + tile * kTileRows + r;
      for (int64_t t = 0; t < block.tokens; ++t) column[t * stride] = dots[t * kTileRows + r] * scale;
    }
  }
}

lb2_status compute_latents(const Block& block) {
  const lb2_linear_args& args = block.args;
  for (int p = 0; p < block.num_paths(); ++p) {
    // The columns between the rank and the end of its last word multiply U's pad bits: they must be zero.
    const int64_t stride = block.plan.latents[p].stride, rank = args.paths[p].rank;
    for (int64_t t = 0; t < block.tokens; ++t)
      std::memset(block.latent_buffer(p) + t * stride + rank, 0,
                  static_cast<size_t>(stride - rank) * sizeof(float));
  }
  return run_group_tiles(block, kTileRows, args.k, latent_tile);
}

// output = sum_p out_scale * (last sign matrix @ its operand) + bias, one tile of output features
void output_tile(const Block& block, int64_t tile) {
  const lb2_linear_args& args = block.args;
  const int64_t first = tile * kTileRows, count = std::min<int64_t>(kTileRows, args.n - first);
  float sums[kMaxTokenBlock * kTileRows], dots[kMaxTokenBlock * kTileRows];
  for (int p = 0; p < block.num_paths(); ++p) {
    const lb2_path& path = args.paths[p];
    const int group = block.plan.group_of[p];
    if (block.single_stage()) {
      const SignRows rows = tile_rows(path.v, path.v_stride, args.n, tile, args.k);
      block.kernels.sign_dots(rows, block.input_buffer(group), block.plan.inputs[group].stride, block.tokens,
                              dots);
    } else {
      const SignRows rows = tile_rows(path.u, path.u_stride, args.n, tile, path.rank);
      block.kernels.sign_dots(rows, block.latent_buffer(p), block.plan.latents[p].stride, block.tokens, dots);
    }
    float scale[kTileRows] = {};
    for (int64_t i = 0; i < count; ++i) scale[i] = load_scale(path.out_scale, first + i);
    for (int64_t t = 0; t < block.tokens; ++t)
      for (int64_t i = 0; i < count; ++i) {
        const float term = dots[t * kTileRows + i] * scale[i];
        float& sum = sums[t * kTileRows + i];
        sum = p == 0 ? term : sum + term;
      }
  }
  for (int64_t t = 0; t < block.tokens; ++t) {
    if (args.bias != nullptr)
      for (int64_t i = 0; i < count; ++i) sums[t * kTileRows + i] += load_scale(args.bias, first + i);
    block.kernels.store(args.dtype, sums + t * kTileRows, count, block.output_at(t, first));
  }
}

lb2_status compute_outputs(const Block& block) {
  const lb2_linear_args& args = block.args;
  int64_t cols = 0;
  for (int p = 0; p < block.num_paths(); ++p) cols += block.single_stage() ? args.k : args.paths[p].rank;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) output_tile(block, tile);
  };
  return run_items(args, tiles(args.n, kTileRows), kTileRows * cols * block.tokens, body);
}

lb2_status forward_block(const Block& block) {
  LB2_RETURN_IF_ERROR(scale_inputs(block));
  if (!block.single_stage()) LB2_RETURN_IF_ERROR(compute_latents(block));
  return compute_outputs(block);
}

// ---- backward ----

// inputs[p] = grad_y * out_scale
lb2_status scale_gradients(const Block& block) {
  const lb2_linear_args& args = block.args;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int p = 0; p < block.num_paths(); ++p) {
        const int64_t stride = block.plan.inputs[p].stride;
        block.kernels.load_scaled(args.dtype, block.input_row(t), args.paths[p].out_scale, args.n, stride,
                                  block.input_buffer(p) + t * stride);
      }
  };
  return run_items(args, block.tokens, args.n * args.num_paths, body);
}

// latents[g] = sum over the paths p of group g of latent_scale * (U^T @ inputs[p]), one tile of columns of U
void latent_gradient_tile(const Block& block, int group, int64_t tile) {
  const lb2_linear_args& args = block.args;
  const int64_t rank = args.paths[block.plan.leader_of[group]].rank;
  const int64_t first = tile * kTileCols, count = std::min<int64_t>(kTileCols, rank - first);
  const int64_t stride = block.plan.latents[group].stride;
  float sums[kMaxTokenBlock * kTileCols];
  bool started = false;
  for (int p = 0; p < block.num_paths(); ++p) {
    if (block.plan.group_of[p] != group) continue;
    const lb2_path& path = args.paths[p];
    const SignRows columns = tile_columns(path.u, path.u_stride, args.n, tile, rank);
    block.kernels.sign_sums(columns, block.input_buffer(p), block.plan.inputs[p].stride, block.tokens, sums);
    for (int64_t t = 0; t < block.tokens; ++t)
      for (int64_t i = 0; i < count; ++i) {
        const float term = sums[t * kTileCols + i] * load_scale(path.latent_scale, first + i);
        float& target = block.latent_buffer(group)[t * stride + first + i];
        target = started ? target + term : term;
      }
    started = true;
  }
}

lb2_status compute_latent_gradients(const Block& block) {
  return run_group_tiles(block, kTileCols, block.args.n, latent_gradient_tile);
}

// output = sum of in_scale * (V^T @ its operand), over groups (two-stage) or paths (single-stage)
void input_gradient_tile(const Block& block, int64_t tile) {
  const lb2_linear_args& args = block.args;
  const int64_t first = tile * kTileCols, count = std::min<int64_t>(kTileCols, args.k - first);
  const int terms = block.single_stage() ? static_cast<int>(block.num_paths()) : block.plan.num_groups;
  float totals[kMaxTokenBlock * kTileCols], sums[kMaxTokenBlock * kTileCols];
  for (int i = 0; i < terms; ++i) {
    const lb2_path& path = args.paths[block.single_stage() ? i : block.plan.leader_of[i]];
    const float* operand = block.single_stage() ? block.input_buffer(i) : block.latent_buffer(i);
    const int64_t stride = block.single_stage() ? block.plan.inputs[i].stride : block.plan.latents[i].stride;
    const SignRows columns = tile_columns(path.v, path.v_stride, path.rank, tile, args.k);
    block.kernels.sign_sums(columns, operand, stride, block.tokens, sums);
    for (int64_t t = 0; t < block.tokens; ++t)
      for (int64_t c = 0; c < count; ++c) {
        const float term = sums[t * kTileCols + c] * load_scale(path.in_scale, first + c);
        float& total = totals[t * kTileCols + c];
        total = i == 0 ? term : total + term;
      }
  }
  for (int64_t t = 0; t < block.tokens; ++t)
    block.kernels.store(args.dtype, totals + t * kTileCols, count, block.output_at(t, first));
}

lb2_status compute_input_gradients(const Block& block) {
  const lb2_linear_args& args = block.args;
  int64_t rows = 0;
  for (int p = 0; p < block.num_paths(); ++p) rows += args.paths[p].rank;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) input_gradient_tile(block, tile);
  };
  return run_items(args, tiles(args.k, kTileCols), kTileCols * rows * block.tokens, body);
}

lb2_status backward_block(const Block& block) {
  LB2_RETURN_IF_ERROR(scale_gradients(block));
  if (!block.single_stage()) LB2_RETURN_IF_ERROR(compute_latent_gradients(block));
  return compute_input_gradients(block);
}

lb2_status run(const lb2_linear_args* args, Direction direction) noexcept {
  lb2_layer_shape shape;
  LB2_RETURN_IF_ERROR(check_layer(args, &shape));
  const IsaKernels* kernels;
  LB2_RETURN_IF_ERROR(find_kernels(args->isa, &kernels));
  const Plan plan =
      direction == Direction::kForward ? plan_forward(shape, args->m) : plan_backward(shape, args->m);
  LB2_RETURN_IF_ERROR(check_buffers(*args, direction, plan.workspace_bytes));
  const uintptr_t address = reinterpret_cast<uintptr_t>(args->workspace);
  float* workspace = reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
  for (int64_t first = 0; first < args->m; first += plan.token_block) {
    const Block block = {*args,     plan,  *kernels->portable,
                         workspace, first, std::min(plan.token_block, args->m - first)};
    LB2_RETURN_IF_ERROR(direction == Direction::kForward ? forward_block(block) : backward_block(block));
  }
  return LB2_OK;
}

}  // namespace
}  // namespace lb2::cpu

extern "C" lb2_status lb2_linear_plan_cpu(const lb2_layer_shape* shape, int64_t m, lb2_isa isa,
                                          lb2_cpu_plan* plan) {
  using namespace lb2::cpu;
  LB2_RETURN_IF_ERROR(lb2::check_shape(shape));
  LB2_RETURN_IF_ERROR(lb2::check_tokens(m));
  if (plan == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "plan must not be NULL");
  if (plan->struct_size != sizeof(lb2_cpu_plan))
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT,
                     "plan->struct_size must equal sizeof(lb2_cpu_plan) = %zu, got %" PRIu64,
                     sizeof(lb2_cpu_plan), plan->struct_size);
  const IsaKernels* kernels;
  LB2_RETURN_IF_ERROR(find_kernels(isa, &kernels));
  const Plan forward = plan_forward(*shape, m);
  plan->forward_workspace_bytes = forward.workspace_bytes;
  plan->backward_workspace_bytes = plan_backward(*shape, m).workspace_bytes;
  plan->token_block = forward.token_block;
  plan->macs = lb2::count_macs(*shape, m);
  plan->isa = kernels->isa;
  plan->first_stages = forward.num_groups;
  return LB2_OK;
}

extern "C" lb2_status lb2_linear_forward_cpu(const lb2_linear_args* args) {
  return lb2::cpu::run(args, lb2::Direction::kForward);
}

extern "C" lb2_status lb2_linear_backward_x_cpu(const lb2_linear_args* args) {
  return lb2::cpu::run(args, lb2::Direction::kBackward);
}
