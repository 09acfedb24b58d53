// A whole MLP in one parallel region.
#include <cinttypes>

#include "core/check.h"
#include "cpu/prepacked/call.h"

namespace lb2::cpu {
namespace {

// The phases of a block: the factors of a norm, the first stages of gate and up, their outputs with the
// activation function, the first stages of down, its outputs.
enum Phase { kNorm, kStages, kHidden, kDownStages, kOutputs, kPhases };

struct Mlp {
  int num_layers;
  Layer layers[3];  // the last one is down
  LayerPlan layer_plans[3];
  CallPlan plan;
  bool halves;  // gate and up are the halves of one layer

  const Layer& down() const { return layers[num_layers - 1]; }
  int64_t hidden_columns() const { return down().layout.k; }
};

// Sums of the rows [begin, end) of a layer. A range that begins within a tile starts behind its first row.
struct LayerRows {
  float* first;
  int64_t stride;
  LayerRows(const LayerTasks& tasks, int64_t begin, int64_t end, Range range, const Scratch& scratch,
            float* sums) {
    constexpr int64_t kTileRows = kTileBlocks * kBlockRows;
    const Range tiles = {begin / kTileRows, divide_up(end, kTileRows)};
    tasks.sum_outputs(tiles, range, scratch, sums);
    first = sums + (begin - tiles.begin * kTileRows);
    stride = tiles.size() * kTileRows;
  }
};

class Block {
 public:
  Block(const Call& call, const Mlp& mlp, lb2_function function, const lb2_rows& output, int64_t first)
      : call_(call),
        mlp_(mlp),
        function_(function),
        output_(output),
        first_(first),
        tokens_(std::min(mlp.plan.token_block, call.m - first)) {}

  lb2_status run() const {
    int64_t counts[kPhases] = {};
    if (call_.norm != nullptr) counts[kNorm] = tokens_;
    for (int i = 0; i + 1 < mlp_.num_layers; ++i) counts[kStages] += tasks(i).stage_tasks();
    counts[kHidden] = mlp_.plan.hidden_splits * mlp_.plan.token_tasks;
    counts[kDownStages] = down().stage_tasks();
    counts[kOutputs] = down().output_tasks();
    return run_phases(call_, mlp_.plan, counts, [&](int phase, int64_t task, const Scratch& scratch) {
      if (phase == kNorm) return call_.measure(mlp_.plan, mlp_.layers[0].layout.k, first_, task);
      if (phase == kHidden) return run_hidden(task, scratch);
      if (phase == kDownStages) return down().run_stage(task, scratch);
      if (phase == kOutputs) return call_.run_outputs(down(), task, scratch, first_, output_);
      const int64_t count = tasks(0).stage_tasks();
      if (task < count) return tasks(0).run_stage(task, scratch);
      return tasks(1).run_stage(task - count, scratch);
    });
  }

 private:
  LayerTasks on(int i, const Source& source) const {
    return {mlp_.layers[i], mlp_.layer_plans[i], mlp_.plan, call_.kernels(), *call_.mode,
            source,         call_.workspace,     tokens_};
  }
  LayerTasks tasks(int i) const { return on(i, call_.source(mlp_.plan, first_)); }
  LayerTasks down() const {
    const char* rows = call_.workspace + mlp_.plan.hidden;
    return on(mlp_.num_layers - 1, {rows, mlp_.plan.hidden_stride, LB2_FLOAT32, nullptr, nullptr});
  }

  // Some columns of what down reads, for some tokens.
  void run_hidden(int64_t task, const Scratch& scratch) const {
    constexpr int64_t kTileRows = kTileBlocks * kBlockRows;
    const int64_t columns = mlp_.hidden_columns();
    const Range tiles =
        piece(divide_up(columns, kTileRows), task / mlp_.plan.token_tasks, mlp_.plan.hidden_splits);
    const Range range = token_piece(mlp_.plan, tokens_, task);
    if (tiles.size() == 0 || range.size() == 0) return;
    const int64_t begin = tiles.begin * kTileRows, end = std::min(tiles.end * kTileRows, columns);
    const bool gated = mlp_.halves || mlp_.num_layers == 3;
    const LayerRows gate(tasks(0), begin, end, range, scratch, scratch.gate);
    const int64_t offset = mlp_.halves ? columns : 0;
    const LayerRows up = gated ? LayerRows(tasks(mlp_.halves ? 0 : 1), begin + offset, end + offset, range,
                                           scratch, scratch.sums)
                               : gate;
    float* hidden = reinterpret_cast<float*>(call_.workspace + mlp_.plan.hidden);
    for (int64_t t = range.begin; t < range.end; ++t) {
      const int64_t row = t - range.begin;
      call_.kernels().activate(function_, gate.first + row * gate.stride,
                               gated ? up.first + row * up.stride : nullptr, end - begin,
                               hidden + t * mlp_.plan.hidden_stride + begin);
    }
  }

  const Call& call_;
  const Mlp& mlp_;
  const lb2_function function_;
  const lb2_rows& output_;
  const int64_t first_, tokens_;
};

lb2_status check_sizes(Mlp* mlp) {
  const int64_t columns = mlp->hidden_columns(), n = mlp->layers[0].layout.n;
  mlp->halves = mlp->num_layers == 2 && n != columns;
  if (mlp->halves && n != 2 * columns)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "layers[0] must have n = %" PRId64 ", k of the last layer, or twice that, got %" PRId64,
                columns, n);
  if (mlp->num_layers == 2) return LB2_OK;
  for (int i = 0; i < 2; ++i)
    if (mlp->layers[i].layout.n != columns)
      return fail(LB2_ERROR_INVALID_ARGUMENT,
                  "layers[%d] must have n = %" PRId64 ", k of the last layer, got %" PRId64, i, columns,
                  mlp->layers[i].layout.n);
  if (mlp->layers[1].layout.k != mlp->layers[0].layout.k)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "layers[1] must have k = %" PRId64 " like layers[0], got %" PRId64, mlp->layers[0].layout.k,
                mlp->layers[1].layout.k);
  return LB2_OK;
}

lb2_status resolve(const lb2_mlp_args* args, Call* call, Mlp* mlp) {
  LB2_RETURN_IF_ERROR(check_mlp(args));
  mlp->num_layers = static_cast<int>(args->num_layers);
  for (int i = 0; i < mlp->num_layers; ++i) LB2_RETURN_IF_ERROR(read_layer(args->layers[i], &mlp->layers[i]));
  LB2_RETURN_IF_ERROR(check_sizes(mlp));
  LB2_RETURN_IF_ERROR(resolve_call(*args, call));
  call->norm = args->norm;
  call->residual = static_cast<const char*>(args->residual);
  call->residual_stride = args->residual_stride;
  const Layout* layouts[3];
  for (int i = 0; i < mlp->num_layers; ++i) layouts[i] = &mlp->layers[i].layout;
  mlp->plan = plan_mlp(layouts, mlp->num_layers, call->plan_input(), mlp->layer_plans);
  return LB2_OK;
}

}  // namespace
}  // namespace lb2::cpu

using namespace lb2::cpu;

extern "C" lb2_status lb2_mlp_plan_cpu(const lb2_mlp_args* args, lb2_fused_plan* plan) {
  Call call;
  Mlp mlp;
  LB2_RETURN_IF_ERROR(resolve(args, &call, &mlp));
  return report_plan(call, mlp.plan, mlp.layers, mlp.num_layers, plan);
}

extern "C" lb2_status lb2_mlp_forward_cpu(const lb2_mlp_args* args) {
  Call call;
  Mlp mlp;
  LB2_RETURN_IF_ERROR(resolve(args, &call, &mlp));
  LB2_RETURN_IF_ERROR(
      lb2::check_mlp_buffers(*args, mlp.layers[0].layout.k, mlp.down().layout.n, mlp.plan.workspace_bytes));
  const lb2_rows output = {args->output, args->output_stride};
  for (int64_t first = 0; first < call.m; first += mlp.plan.token_block)
    LB2_RETURN_IF_ERROR(Block(call, mlp, args->function, output, first).run());
  return LB2_OK;
}
