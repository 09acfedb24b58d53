// Calls on one layer, and on several that share their input: norm, first stages, outputs and residual in one
// parallel region.
#include <cinttypes>

#include "core/check.h"
#include "cpu/prepacked/call.h"

namespace lb2::cpu {

lb2_status read_layer(const lb2_prepacked_layer& bytes, Layer* layer) noexcept {
  Header header;
  LB2_RETURN_IF_ERROR(read_layout(bytes.data, bytes.bytes, &header, &layer->layout));
  layer->data = static_cast<const char*>(bytes.data);
  layer->bias = bytes.bias;
  return LB2_OK;
}

lb2_status choose_mode(Call* call) noexcept {
  const LookupKernels& kernels = call->kernels();
  const TileKernels* tiles = call->isa->tiles;
  const bool many = tiles != nullptr && call->m >= kLeastTileTokens;
  if (call->activation == LB2_ACTIVATION_AUTO)
    call->activation = call->dtype == LB2_FLOAT32 ? LB2_ACTIVATION_EXACT
                       : many                     ? LB2_ACTIVATION_INT8X2
                                                  : LB2_ACTIVATION_INT16;
  if (call->activation == LB2_ACTIVATION_INT8X2) {
    if (tiles == nullptr)
      return fail(LB2_ERROR_UNSUPPORTED,
                  "activation LB2_ACTIVATION_INT8X2 needs the amx kernels, got the %s kernels",
                  lb2_isa_name(call->isa->isa));
    call->mode = &tiles->int8x2;
  } else if (call->activation == LB2_ACTIVATION_INT8) {
    call->mode = many ? &tiles->int8 : &kernels.int8;
  } else {
    call->mode = call->activation == LB2_ACTIVATION_EXACT   ? &kernels.exact
                 : call->activation == LB2_ACTIVATION_INT16 ? &kernels.int16
                                                            : &kernels.sign;
  }
  return LB2_OK;
}

void plan_layers(const Call& call, Group* group) noexcept {
  const Layout* layouts[LB2_MAX_LAYERS];
  for (int i = 0; i < group->num_layers; ++i) layouts[i] = &group->layers[i].layout;
  group->plan = plan_group(layouts, group->num_layers, call.plan_input(), group->layer_plans);
}

namespace {

// The phases of a block: the factors of a norm, the first stages of all layers, their outputs.
enum Phase { kNorm, kStages, kOutputs, kPhases };

lb2_status run_block(const Call& call, const Group& group, const lb2_rows* outputs, int64_t first) {
  const CallPlan& plan = group.plan;
  const int64_t tokens = std::min(plan.token_block, call.m - first);
  const auto tasks_of = [&](int i) {
    return LayerTasks{group.layers[i], group.layer_plans[i],     plan,           call.kernels(),
                      *call.mode,      call.source(plan, first), call.workspace, tokens};
  };
  int64_t counts[kPhases] = {call.norm == nullptr ? 0 : tokens, 0, 0};
  for (int i = 0; i < group.num_layers; ++i) {
    counts[kStages] += tasks_of(i).stage_tasks();
    counts[kOutputs] += tasks_of(i).output_tasks();
  }
  return run_phases(call, plan, counts, [&](int phase, int64_t task, const Scratch& scratch) {
    if (phase == kNorm) return call.measure(plan, group.layers[0].layout.k, first, task);
    for (int i = 0; i < group.num_layers; ++i) {
      const LayerTasks tasks = tasks_of(i);
      const int64_t count = phase == kStages ? tasks.stage_tasks() : tasks.output_tasks();
      if (task < count) {
        if (phase == kStages) return tasks.run_stage(task, scratch);
        return call.run_outputs(tasks, task, scratch, first, outputs[i]);
      }
      task -= count;
    }
  });
}

lb2_status resolve_prepacked(const lb2_prepacked_args* args, Call* call, Group* group) {
  LB2_RETURN_IF_ERROR(check_prepacked(args));
  group->num_layers = 1;
  LB2_RETURN_IF_ERROR(read_layer({args->layer, args->layer_bytes, args->bias}, &group->layers[0]));
  LB2_RETURN_IF_ERROR(resolve_call(*args, call));
  plan_layers(*call, group);
  return LB2_OK;
}

lb2_status resolve_grouped(const lb2_grouped_args* args, Call* call, Group* group) {
  LB2_RETURN_IF_ERROR(check_grouped(args));
  group->num_layers = static_cast<int>(args->num_layers);
  for (int i = 0; i < group->num_layers; ++i) {
    LB2_RETURN_IF_ERROR(read_layer(args->layers[i], &group->layers[i]));
    if (group->layers[i].layout.k != group->layers[0].layout.k)
      return fail(LB2_ERROR_INVALID_ARGUMENT,
                  "layers[%d] must have k = %" PRId64 " like layers[0], got %" PRId64, i,
                  group->layers[0].layout.k, group->layers[i].layout.k);
  }
  LB2_RETURN_IF_ERROR(resolve_call(*args, call));
  call->norm = args->norm;
  call->residual = static_cast<const char*>(args->residual);
  call->residual_stride = args->residual_stride;
  plan_layers(*call, group);
  return LB2_OK;
}

}  // namespace

lb2_status run_group(const Call& call, const Group& group, const lb2_rows* outputs) noexcept {
  for (int64_t first = 0; first < call.m; first += group.plan.token_block)
    LB2_RETURN_IF_ERROR(run_block(call, group, outputs, first));
  return LB2_OK;
}

lb2_status report_plan(const Call& call, const CallPlan& plan, const Layer* layers, int num_layers,
                       lb2_fused_plan* report) noexcept {
  if (report == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "plan must not be NULL");
  if (report->struct_size != sizeof(lb2_fused_plan))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "plan->struct_size must equal sizeof(lb2_fused_plan) = %zu, got %" PRIu64,
                sizeof(lb2_fused_plan), report->struct_size);
  report->workspace_bytes = plan.workspace_bytes;
  report->token_block = plan.token_block;
  report->workers = plan.workers;
  report->k = layers[0].layout.k;
  for (int i = 0; i < LB2_MAX_LAYERS; ++i) report->n[i] = i < num_layers ? layers[i].layout.n : 0;
  report->isa = call.isa->isa;
  report->activation = call.activation;
  return LB2_OK;
}

}  // namespace lb2::cpu

using namespace lb2::cpu;

extern "C" lb2_status lb2_prepacked_plan_cpu(const lb2_prepacked_args* args, lb2_prepacked_plan* plan) {
  if (plan == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "plan must not be NULL");
  if (plan->struct_size != sizeof(lb2_prepacked_plan))
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT,
                     "plan->struct_size must equal sizeof(lb2_prepacked_plan) = %zu, got %" PRIu64,
                     sizeof(lb2_prepacked_plan), plan->struct_size);
  Call call;
  Group group;
  LB2_RETURN_IF_ERROR(resolve_prepacked(args, &call, &group));
  plan->workspace_bytes = group.plan.workspace_bytes;
  plan->token_block = group.plan.token_block;
  plan->workers = group.plan.workers;
  plan->isa = call.isa->isa;
  plan->activation = call.activation;
  plan->n = group.layers[0].layout.n;
  plan->k = group.layers[0].layout.k;
  return LB2_OK;
}

extern "C" lb2_status lb2_prepacked_forward_cpu(const lb2_prepacked_args* args) {
  Call call;
  Group group;
  LB2_RETURN_IF_ERROR(resolve_prepacked(args, &call, &group));
  const Layout& layout = group.layers[0].layout;
  LB2_RETURN_IF_ERROR(lb2::check_prepacked_buffers(*args, layout.k, layout.n, group.plan.workspace_bytes));
  const lb2_rows output = {args->output, args->output_stride};
  return run_group(call, group, &output);
}

extern "C" lb2_status lb2_grouped_plan_cpu(const lb2_grouped_args* args, lb2_fused_plan* plan) {
  Call call;
  Group group;
  LB2_RETURN_IF_ERROR(resolve_grouped(args, &call, &group));
  return report_plan(call, group.plan, group.layers, group.num_layers, plan);
}

extern "C" lb2_status lb2_grouped_forward_cpu(const lb2_grouped_args* args) {
  Call call;
  Group group;
  LB2_RETURN_IF_ERROR(resolve_grouped(args, &call, &group));
  int64_t n[LB2_MAX_LAYERS];
  for (int i = 0; i < group.num_layers; ++i) n[i] = group.layers[i].layout.n;
  LB2_RETURN_IF_ERROR(
      lb2::check_grouped_buffers(*args, group.layers[0].layout.k, n, group.plan.workspace_bytes));
  return run_group(call, group, args->outputs);
}
