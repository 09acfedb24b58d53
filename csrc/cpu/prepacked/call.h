// What calls on prepacked layers have in common: arguments, the norm of the input, the rows of the output.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/shape.h"
#include "core/status.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/prepacked/layer.h"

namespace lb2::cpu {

// Arguments that were checked, and what they resolve to.
struct Call {
  int64_t m;
  const char* input;
  int64_t input_stride;
  const lb2_norm* norm;
  const char* residual;
  int64_t residual_stride;
  lb2_dtype dtype;
  lb2_activation activation;  // not AUTO
  const IsaKernels* isa;
  const LookupMode* mode;
  int64_t threads;
  char* workspace;  // aligned
  lb2_parallel_for parallel_for;
  void* parallel_context;

  const LookupKernels& kernels() const { return *isa->lookup; }
  PlanInput plan_input() const { return {kernels(), *mode, m, threads, norm != nullptr}; }

  // The input from token `first` on.
  Source source(const CallPlan& plan, int64_t first) const {
    return {input + first * input_stride * element_bytes(dtype), input_stride, dtype, norm,
            reinterpret_cast<const float*>(workspace + plan.factors)};
  }

  // Computes the norm's factor of a token of the block that begins at `first`.
  void measure(const CallPlan& plan, int64_t k, int64_t first, int64_t token) const {
    const char* row = input + (first + token) * input_stride * element_bytes(dtype);
    const float mean = kernels().sum_squares(dtype, row, k) / static_cast<float>(k);
    reinterpret_cast<float*>(workspace + plan.factors)[token] = 1.0f / std::sqrt(mean + norm->eps);
  }

  // Adds the residual to `rows` sums of a token and stores them.
  void finish(float* sums, int64_t token, int64_t first_row, int64_t rows, const lb2_rows& output) const {
    const int64_t bytes = element_bytes(dtype);
    if (residual != nullptr)
      kernels().add_residual(dtype, residual + (token * residual_stride + first_row) * bytes, rows, sums);
    char* out = static_cast<char*>(output.data) + (token * output.stride + first_row) * bytes;
    kernels().store(dtype, sums, rows, out);
  }

  // Stores the outputs of one task of a layer.
  void run_outputs(const LayerTasks& tasks, int64_t task, const Scratch& scratch, int64_t first,
                   const lb2_rows& output) const {
    const Range tiles = tasks.output_range(task), range = token_piece(tasks.call, tasks.tokens, task);
    if (tiles.size() == 0 || range.size() == 0) return;
    tasks.sum_outputs(tiles, range, scratch, scratch.sums);
    const int64_t first_row = tiles.begin * kTileBlocks * kBlockRows;
    const int64_t stride = tiles.size() * kTileBlocks * kBlockRows;
    const int64_t rows = std::min(stride, tasks.layout().n - first_row);
    for (int64_t t = range.begin; t < range.end; ++t)
      finish(scratch.sums + (t - range.begin) * stride, first + t, first_row, rows, output);
  }
};

// Resolves AUTO by the element type, the instruction set and the tokens, and finds the kernels of the mode.
lb2_status choose_mode(Call* call) noexcept;

// Reads the fields that all arguments have; check_call must have passed.
template <typename Args>
lb2_status resolve_call(const Args& args, Call* call) {
  *call = {};
  call->m = args.m;
  call->input = static_cast<const char*>(args.input);
  call->input_stride = args.input_stride;
  call->dtype = args.dtype;
  LB2_RETURN_IF_ERROR(find_kernels(args.isa, &call->isa));
  call->activation = args.activation;
  LB2_RETURN_IF_ERROR(choose_mode(call));
  call->threads = args.parallel_for == nullptr ? 1 : std::max<int64_t>(1, args.num_threads);
  const uintptr_t address = reinterpret_cast<uintptr_t>(args.workspace);
  call->workspace = reinterpret_cast<char*>((address + 63) & ~uintptr_t{63});
  call->parallel_for = args.parallel_for;
  call->parallel_context = args.parallel_context;
  return LB2_OK;
}

// Runs phases of counts[i] tasks on the workers of a plan: run(phase, task, scratch).
template <int kCount, typename Run>
lb2_status run_phases(const Call& call, const CallPlan& plan, const int64_t (&counts)[kCount],
                      const Run& run) {
  Phases phases(counts, plan.workers);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const Scratch scratch(call.workspace, plan, worker);
      phases.work(worker, [&](int phase, int64_t task, int64_t) { run(phase, task, scratch); });
    }
  };
  return run_parallel(call.parallel_for, call.parallel_context, plan.workers, 1, body);
}

// Reads and checks the header of a layer's bytes.
lb2_status read_layer(const lb2_prepacked_layer& bytes, Layer* layer) noexcept;

// The layers of a call on one input, planned.
struct Group {
  int num_layers;
  Layer layers[LB2_MAX_LAYERS];
  LayerPlan layer_plans[LB2_MAX_LAYERS];
  CallPlan plan;
};

// Plans the layers that were read.
void plan_layers(const Call& call, Group* group) noexcept;

// Runs them on all tokens.
lb2_status run_group(const Call& call, const Group& group, const lb2_rows* outputs) noexcept;

// Sets what the plans of all calls on several layers report.
lb2_status report_plan(const Call& call, const CallPlan& plan, const Layer* layers, int num_layers,
                       lb2_fused_plan* report) noexcept;

}  // namespace lb2::cpu
