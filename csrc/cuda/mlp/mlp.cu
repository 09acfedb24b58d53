// The entry point of an MLP: two calls, of which the second reads what the first has left in the workspace.
#include <cinttypes>

#include "core/shape.h"
#include "core/status.h"
#include "cuda/launch.h"
#include "cuda/mlp/plan.h"
#include "cuda/pointwise/launch.h"

lb2_status lb2_mlp_forward_cuda(const lb2_linear_args* args, int64_t num_layers, lb2_function function,
                                const lb2_cuda_extras* extras, const lb2_cuda_mlp_plan* made, void* stream) {
  using namespace lb2::cuda;
  lb2_layer_shape shapes[kMostMlpLayers];
  LB2_RETURN_IF_ERROR(check_mlp_layers(args, num_layers, function, shapes));
  if (made == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "plan must not be NULL");
  if (made->struct_size != sizeof(lb2_cuda_mlp_plan))
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT,
                     "plan->struct_size must equal sizeof(lb2_cuda_mlp_plan) = %zu, got %" PRIu64,
                     sizeof(lb2_cuda_mlp_plan), made->struct_size);
  MlpShape mlp;
  LB2_RETURN_IF_ERROR(find_mlp_shape(shapes, num_layers, &mlp));

  const int64_t m = args[0].m;
  lb2_linear_args first_args[kMostMlpLayers - 1];
  for (int64_t i = 0; i < mlp.num_first; ++i) {
    first_args[i] = args[i];
    first_args[i].input = args[0].input;
    first_args[i].input_stride = args[0].input_stride;
  }
  Layers first, last;
  LB2_RETURN_IF_ERROR(gather_layers(first_args, mlp.num_first, &first));
  lb2_linear_args last_args = args[mlp.num_first];
  LB2_RETURN_IF_ERROR(gather_layers(&last_args, 1, &last));
  if (extras != nullptr) {
    lb2_cuda_extras part = *extras;
    part.residual = nullptr;
    LB2_RETURN_IF_ERROR(add_extras(part, &first));
    part = *extras;
    part.norm = nullptr;
    LB2_RETURN_IF_ERROR(add_extras(part, &last));
  }
  Plan first_plan, last_plan;
  LB2_RETURN_IF_ERROR(resume_plan(first.shape, &made->first, &first_plan));
  LB2_RETURN_IF_ERROR(resume_plan(last.shape, &made->last, &last_plan));
  const int64_t call_bytes = first_plan.workspace_bytes > last_plan.workspace_bytes
                                 ? first_plan.workspace_bytes
                                 : last_plan.workspace_bytes;
  MlpWorkspace parts;
  LB2_RETURN_IF_ERROR(lay_out_mlp(mlp, m, args[0].dtype, call_bytes, &parts));
  if (made->workspace_bytes != parts.bytes)
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "plan->workspace_bytes must be %" PRId64 ", got %" PRId64,
                     parts.bytes, made->workspace_bytes);
  if (m == 0) return LB2_OK;
  if (args[0].workspace == nullptr || args[0].workspace_bytes < parts.bytes)
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT,
                     "layers[0].workspace must hold %" PRId64 " bytes, got %" PRId64 " at %p", parts.bytes,
                     args[0].workspace_bytes, args[0].workspace);

  char* workspace = align_workspace(args[0].workspace);
  const int64_t row = mlp.width * (mlp.halves ? 2 : 1);
  const int64_t half_bytes = mlp.width * lb2::element_bytes(args[0].dtype);
  for (int64_t i = 0; i < mlp.num_first; ++i) {
    first_args[i].output = workspace + parts.outputs[i];
    first_args[i].output_stride = row;
  }
  char* gate = workspace + parts.outputs[0];
  const void* up = mlp.halves ? gate + half_bytes : workspace + parts.outputs[1];
  last_args.input = last.input = gate;
  last_args.input_stride = last.input_stride = row;
  first_args[0].workspace = last_args.workspace = workspace;
  first_args[0].workspace_bytes = last_args.workspace_bytes = parts.outputs[0];
  LB2_RETURN_IF_ERROR(check_data(first, 0));
  LB2_RETURN_IF_ERROR(check_data(last, 0));

  // In the decode kernels, the first call applies the function where it stores gate, and the second
  // multiplies by up where it converts: nobody computes exponentials twice.
  if (is_decode(first_plan)) {
    first.extras.function = function;
    first.extras.function_rows = static_cast<int32_t>(mlp.width);
  }
  if (is_decode(last_plan) && mlp.gated) {
    last.extras.factor = up;
    last.extras.factor_stride = row;
  }
  last.extras.after_own = true;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  LB2_RETURN_IF_ERROR(queue_call(first, first_plan, workspace, queue));
  Pointwise between = {gate, row};
  if (!is_decode(first_plan)) between.function = function;
  if (!is_decode(last_plan) && mlp.gated) {
    between.factor = up;
    between.factor_stride = row;
  }
  if (between.function >= 0 || between.factor != nullptr)
    LB2_RETURN_IF_ERROR(queue_pointwise(between, m, mlp.width, args[0].dtype, queue));
  return queue_call(last, last_plan, workspace, queue);
}
