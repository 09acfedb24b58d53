// The forward call on a prepacked layer: both stages, all paths and the epilogue in one parallel region.
#include <cinttypes>
#include <cmath>
#include <cstring>

#include "core/check.h"
#include "core/shape.h"
#include "core/status.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/prepacked/layout.h"
#include "cpu/prepacked/plan.h"

namespace lb2::cpu {
namespace {

constexpr int64_t kMostTileTokens = 8;

struct Call {
  const lb2_prepacked_args& args;
  const Layout& layout;
  const PrepackedPlan& plan;
  const LookupKernels& kernels;
  const LookupMode& mode;
  char* workspace;
  int64_t first;   // token of this block
  int64_t tokens;  // of this block

  bool binarized() const { return &mode == &kernels.sign; }
  int64_t element_bytes() const { return lb2::element_bytes(args.dtype); }
  const char* layer() const { return static_cast<const char*>(args.layer); }
  const float* scale(int64_t offset) const { return reinterpret_cast<const float*>(layer() + offset); }
  const char* input_at(int64_t token, int64_t column) const {
    return static_cast<const char*>(args.input) +
           ((first + token) * args.input_stride + column) * element_bytes();
  }
  char* output_at(int64_t token, int64_t column) const {
    return static_cast<char*>(args.output) +
           ((first + token) * args.output_stride + column) * element_bytes();
  }
  // Row 0 of the sums of a segment.
  float* part(int stage, int64_t segment, int64_t token) const {
    return reinterpret_cast<float*>(workspace + plan.parts[stage]) +
           (segment * plan.token_block + token) * layout.stages[stage].v.padded_rows();
  }
};

// One worker's scratch memory.
struct Scratch {
  float *operand, *sums, *dots;
  char* tables;
  Scratch(const Call& call, int64_t worker) {
    char* start = call.workspace + call.plan.worker_start + worker * call.plan.worker_bytes;
    operand = reinterpret_cast<float*>(start);
    tables = start + call.plan.worker_tables;
    sums = reinterpret_cast<float*>(start + call.plan.worker_sums);
    dots = reinterpret_cast<float*>(start + call.plan.worker_dots);
  }
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Piece `index` of `count` near-equal pieces of [0, size).
Range piece(int64_t size, int64_t index, int64_t count) {
  return {size * index / count, size * (index + 1) / count};
}

// Sums of the rows of `tiles` over one chunk of m for `tokens`, which load(token, columns, padded) provides
// one by one: row 0 of tile tiles.begin of token t goes to out + (t - tokens.begin) * stride.
template <typename Load>
void sum_chunk(const Call& call, const Scratch& scratch, const Matrix& m, int64_t chunk, Range tiles,
               Range tokens, const Load& load, float* out, int64_t stride, bool add) {
  const int64_t words = m.words_of(chunk), columns = m.columns_of(chunk);
  const int64_t padded = (words * kWordCols + 15) / 16 * 16;
  float scales[kMostTileTokens];
  Tables tables = {scratch.tables, words * call.mode.table_bytes, scales, 0, columns};
  for (int64_t token = tokens.begin; token < tokens.end; token += tables.tokens) {
    tables.tokens = std::min(call.mode.tokens, tokens.end - token);
    for (int64_t t = 0; t < tables.tokens; ++t) {
      load(token + t, m.first_column(chunk), columns, padded, scratch.operand);
      scales[t] = call.mode.build(scratch.operand, words, scratch.tables + t * tables.stride);
    }
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const SignTile signs = {call.layer() + m.tile_offset(chunk, tile), words, m.tile_blocks(tile)};
      float* rows = out + (token - tokens.begin) * stride + (tile - tiles.begin) * kTileBlocks * kBlockRows;
      call.mode.sums(signs, tables, {rows, stride, add});
    }
  }
}

// x * in_scale, columns [first, first + columns) and zeros up to `padded`.
void load_input(const Call& call, int stage, int64_t token, int64_t first, int64_t columns, int64_t padded,
                float* out) {
  // The vectors at the end of a chunk may read into the next one, which costs less than stopping short.
  const int64_t readable = std::min(padded, call.layout.k - first);
  call.kernels.load_scaled(call.args.dtype, call.input_at(token, first),
                           call.scale(call.layout.stages[stage].in_scale) + first, readable, padded, out);
  for (int64_t i = columns; i < readable; ++i) out[i] = 0.0f;
}

// latent_scale * (V @ (x * in_scale)), the same way.
void load_latent(const Call& call, const PathLayout& path, int64_t token, int64_t first, int64_t columns,
                 int64_t padded, float* out) {
  const Matrix& v = call.layout.stages[path.stage].v;
  const float* parts = call.part(path.stage, 0, token) + path.row + first;
  call.kernels.load_latents(parts, call.plan.token_block * v.padded_rows(), v.num_segments,
                            call.scale(path.latent_scale) + first, columns, padded, out);
}

// The mean magnitude of an operand, in chunks of the matrix it meets: the scale of its signs.
template <typename Load>
float mean_magnitude(const Call& call, const Scratch& scratch, const Matrix& m, const Load& load) {
  float sum = 0.0f;
  for (int64_t chunk = 0; chunk < m.num_chunks; ++chunk) {
    const int64_t padded = (m.words_of(chunk) * kWordCols + 15) / 16 * 16;
    load(m.first_column(chunk), m.columns_of(chunk), padded, scratch.operand);
    sum += call.kernels.abs_sum(scratch.operand, padded);
  }
  return sum / static_cast<float>(m.cols);
}

// One segment of columns of a first stage, for a range of its rows and tokens.
void stage_task(const Call& call, int64_t task, int64_t worker) {
  const Scratch scratch(call, worker);
  const PrepackedPlan& plan = call.plan;
  const int64_t token_task = task % plan.token_tasks;
  int64_t unit = task / plan.token_tasks;
  const int64_t split = unit % plan.stage_splits;
  unit /= plan.stage_splits;
  int stage = 0;
  while (unit >= call.layout.stages[stage].v.num_segments) unit -= call.layout.stages[stage++].v.num_segments;
  const Matrix& v = call.layout.stages[stage].v;
  const Range tiles = piece(v.tiles(), split, plan.stage_splits);
  const Range tokens = piece(call.tokens, token_task, plan.token_tasks);
  if (tiles.size() == 0 || tokens.size() == 0) return;
  float* out = call.part(stage, unit, tokens.begin) + tiles.begin * kTileBlocks * kBlockRows;
  const int64_t begin = unit * v.segment_chunks, end = std::min(begin + v.segment_chunks, v.num_chunks);
  for (int64_t chunk = begin; chunk < end; ++chunk)
    sum_chunk(
        call, scratch, v, chunk, tiles, tokens,
        [&](int64_t token, int64_t first, int64_t columns, int64_t padded, float* z) {
          load_input(call, stage, token, first, columns, padded, z);
        },
        out, v.padded_rows(), chunk > begin);
}

// Output rows of some tiles and tokens: sum over paths, bias, rounding.
void output_task(const Call& call, int64_t task, int64_t worker) {
  const Scratch scratch(call, worker);
  const PrepackedPlan& plan = call.plan;
  const Layout& layout = call.layout;
  const Matrix& any = layout.single_stage ? layout.stages[0].v : layout.paths[0].u;
  const Range tiles = piece(any.tiles(), task / plan.token_tasks, plan.row_splits);
  const Range tokens = piece(call.tokens, task % plan.token_tasks, plan.token_tasks);
  if (tiles.size() == 0 || tokens.size() == 0) return;
  const int64_t first_row = tiles.begin * kTileBlocks * kBlockRows;
  const int64_t stride = tiles.size() * kTileBlocks * kBlockRows;
  const int64_t rows = std::min(stride, layout.n - first_row);
  for (int p = 0; p < layout.num_paths; ++p) {
    const PathLayout& path = layout.paths[p];
    const Matrix& m = layout.single_stage ? layout.stages[path.stage].v : path.u;
    const auto load = [&](int64_t token, int64_t first, int64_t columns, int64_t padded, float* z) {
      if (layout.single_stage)
        load_input(call, path.stage, token, first, columns, padded, z);
      else
        load_latent(call, path, token, first, columns, padded, z);
    };
    for (int64_t chunk = 0; chunk < m.num_chunks; ++chunk)
      sum_chunk(call, scratch, m, chunk, tiles, tokens, load, scratch.dots, stride, chunk > 0);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
      float factor = 1.0f;
      if (call.binarized()) {
        factor =
            mean_magnitude(call, scratch, m, [&](int64_t first, int64_t columns, int64_t padded, float* z) {
              load(t, first, columns, padded, z);
            });
        const auto load_x = [&](int64_t first, int64_t columns, int64_t padded, float* z) {
          load_input(call, path.stage, t, first, columns, padded, z);
        };
        if (!layout.single_stage)
          factor *= mean_magnitude(call, scratch, layout.stages[path.stage].v, load_x);
      }
      const int64_t row = (t - tokens.begin) * stride;
      call.kernels.scale_rows(scratch.dots + row, call.scale(path.out_scale) + first_row, factor, rows, p > 0,
                              scratch.sums + row);
    }
  }
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    float* sums = scratch.sums + (t - tokens.begin) * stride;
    if (call.args.bias != nullptr) call.kernels.add_bias(call.args.bias + first_row, rows, sums);
    call.kernels.store(call.args.dtype, sums, rows, call.output_at(t, first_row));
  }
}

lb2_status run_block(const Call& call) {
  int64_t units = 0;
  for (int s = 0; s < call.layout.num_stages && !call.layout.single_stage; ++s)
    units += call.layout.stages[s].v.num_segments;
  const int64_t counts[Phases::kMost] = {units * call.plan.stage_splits * call.plan.token_tasks,
                                         call.plan.row_splits * call.plan.token_tasks};
  Phases phases(counts, call.plan.workers);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      phases.work(worker, [&](int phase, int64_t task, int64_t slot) {
        if (phase == 0)
          stage_task(call, task, slot);
        else
          output_task(call, task, slot);
      });
  };
  return run_parallel(call.args.parallel_for, call.args.parallel_context, call.plan.workers, 1, body);
}

// What a call resolves to.
struct Resolved {
  Header header;
  Layout layout;
  const IsaKernels* isa;
  lb2_activation activation;
  const LookupMode* mode;
  PrepackedPlan plan;
};

lb2_status resolve(const lb2_prepacked_args* args, Resolved* resolved) {
  LB2_RETURN_IF_ERROR(check_prepacked(args));
  LB2_RETURN_IF_ERROR(read_layout(args->layer, args->layer_bytes, &resolved->header, &resolved->layout));
  LB2_RETURN_IF_ERROR(find_kernels(args->isa, &resolved->isa));
  const LookupKernels& kernels = *resolved->isa->lookup;
  resolved->activation = args->activation;
  if (args->activation == LB2_ACTIVATION_AUTO)
    resolved->activation = args->dtype == LB2_FLOAT32 ? LB2_ACTIVATION_EXACT : LB2_ACTIVATION_INT16;
  const LookupMode* modes[] = {nullptr, &kernels.exact, &kernels.int16, &kernels.int8, &kernels.sign};
  resolved->mode = modes[resolved->activation];
  resolved->plan =
      plan_prepacked(resolved->layout, kernels, *resolved->mode, args->m,
                     args->parallel_for == nullptr ? 1 : std::max<int64_t>(1, args->num_threads));
  return LB2_OK;
}

}  // namespace
}  // namespace lb2::cpu

using namespace lb2::cpu;

extern "C" lb2_status lb2_prepacked_plan_cpu(const lb2_prepacked_args* args, lb2_prepacked_plan* plan) {
  if (plan == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "plan must not be NULL");
  if (plan->struct_size != sizeof(lb2_prepacked_plan))
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT,
                     "plan->struct_size must equal sizeof(lb2_prepacked_plan) = %zu, got %" PRIu64,
                     sizeof(lb2_prepacked_plan), plan->struct_size);
  Resolved resolved;
  LB2_RETURN_IF_ERROR(resolve(args, &resolved));
  plan->workspace_bytes = resolved.plan.workspace_bytes;
  plan->token_block = resolved.plan.token_block;
  plan->workers = resolved.plan.workers;
  plan->isa = resolved.isa->isa;
  plan->activation = resolved.activation;
  plan->n = resolved.layout.n;
  plan->k = resolved.layout.k;
  return LB2_OK;
}

extern "C" lb2_status lb2_prepacked_forward_cpu(const lb2_prepacked_args* args) {
  Resolved resolved;
  LB2_RETURN_IF_ERROR(resolve(args, &resolved));
  LB2_RETURN_IF_ERROR(lb2::check_prepacked_buffers(*args, resolved.layout.k, resolved.layout.n,
                                                   resolved.plan.workspace_bytes));
  const uintptr_t address = reinterpret_cast<uintptr_t>(args->workspace);
  char* workspace = reinterpret_cast<char*>((address + 63) & ~uintptr_t{63});
  for (int64_t first = 0; first < args->m; first += resolved.plan.token_block) {
    const Call call = {
        *args,          resolved.layout, resolved.plan, *resolved.isa->lookup,
        *resolved.mode, workspace,       first,         std::min(resolved.plan.token_block, args->m - first)};
    LB2_RETURN_IF_ERROR(run_block(call));
  }
  return LB2_OK;
}
