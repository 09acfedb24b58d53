#include "cuda/mlp/plan.h"

#include <algorithm>
#include <cinttypes>

#include "core/check.h"
#include "core/shape.h"
#include "core/status.h"

namespace lb2::cuda {
namespace {

lb2_status check_function(lb2_function function) {
  if (function >= LB2_FUNCTION_SILU && function <= LB2_FUNCTION_RELU) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "function must be LB2_FUNCTION_SILU (0), _GELU (1), _GELU_TANH (2) or _RELU (3), got %" PRId32,
              function);
}

}  // namespace

lb2_status check_mlp_layers(const lb2_linear_args* args, int64_t count, lb2_function function,
                            lb2_layer_shape* shapes) noexcept {
  LB2_RETURN_IF_ERROR(check_function(function));
  if (count != 2 && count != kMostMlpLayers)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "num_layers of an MLP must be 2 or 3, got %" PRId64, count);
  if (args == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "layers must not be NULL");
  for (int64_t i = 0; i < count; ++i) {
    LB2_RETURN_IF_ERROR(name_layer("layers", count, i, check_layer(args + i, shapes + i)));
    if (args[i].m != args[0].m || args[i].dtype != args[0].dtype)
      return fail(LB2_ERROR_INVALID_ARGUMENT,
                  "layers[%" PRId64 "].m and dtype must equal those of layers[0], %" PRId64 " and %" PRId32
                  ", got %" PRId64 " and %" PRId32,
                  i, args[0].m, args[0].dtype, args[i].m, args[i].dtype);
  }
  return LB2_OK;
}

lb2_status find_mlp_shape(const lb2_layer_shape* shapes, int64_t num_layers, MlpShape* mlp) noexcept {
  if (num_layers != 2 && num_layers != 3)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "num_layers of an MLP must be 2 or 3, got %" PRId64, num_layers);
  if (shapes == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "shapes must not be NULL");
  for (int64_t i = 0; i < num_layers; ++i)
    LB2_RETURN_IF_ERROR(name_layer("shapes", num_layers, i, check_shape(shapes + i)));
  const lb2_layer_shape& up = shapes[num_layers - 2];
  const lb2_layer_shape& down = shapes[num_layers - 1];
  mlp->num_first = num_layers - 1;
  mlp->width = down.k;
  mlp->halves = num_layers == 2 && up.n == 2 * down.k;
  mlp->gated = num_layers == 3 || mlp->halves;
  if (num_layers == 3 && (shapes[0].n != down.k || up.n != down.k))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "n of gate and of up must be k of down, %" PRId64 ", got %" PRId64 " and %" PRId64, down.k,
                shapes[0].n, up.n);
  if (num_layers == 2 && up.n != down.k && up.n != 2 * down.k)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "n of up must be k of down, %" PRId64 ", or twice that, got %" PRId64, down.k, up.n);
  return LB2_OK;
}

lb2_status lay_out_mlp(const MlpShape& mlp, int64_t m, lb2_dtype dtype, int64_t call_bytes,
                       MlpWorkspace* workspace) noexcept {
  const int64_t row_bytes = mlp.width * (mlp.halves ? 2 : 1) * element_bytes(dtype);
  int64_t bytes;
  if (__builtin_mul_overflow(m, row_bytes, &bytes) || bytes > INT64_MAX / 8)
    return fail(LB2_ERROR_UNSUPPORTED,
                "the outputs of an MLP's first layers must be at most %" PRId64 " bytes, got m=%" PRId64
                " rows of %" PRId64 " bytes",
                INT64_MAX / 8, m, row_bytes);
  workspace->outputs[0] = align_bytes(call_bytes);
  workspace->outputs[1] = workspace->outputs[0] + align_bytes(bytes);
  workspace->bytes = workspace->outputs[1] + (mlp.num_first == 2 ? align_bytes(bytes) : 0);
  if (m > 0) workspace->bytes += kWorkspaceAlignment;
  return LB2_OK;
}

}  // namespace lb2::cuda

lb2_status lb2_mlp_plan_cuda(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m, lb2_dtype dtype,
                             lb2_activation activation, const lb2_cuda_device* device, int32_t normed,
                             lb2_cuda_mlp_plan* out) {
  using namespace lb2::cuda;
  if (out == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "plan must not be NULL");
  if (out->struct_size != sizeof(lb2_cuda_mlp_plan))
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT,
                     "plan->struct_size must equal sizeof(lb2_cuda_mlp_plan) = %zu, got %" PRIu64,
                     sizeof(lb2_cuda_mlp_plan), out->struct_size);
  MlpShape mlp;
  LB2_RETURN_IF_ERROR(find_mlp_shape(shapes, num_layers, &mlp));
  Plan first, last;
  LB2_RETURN_IF_ERROR(
      plan_call(shapes, mlp.num_first, m, dtype, activation, device, nullptr, normed != 0, &first));
  LB2_RETURN_IF_ERROR(
      plan_call(shapes + mlp.num_first, 1, m, dtype, activation, device, nullptr, false, &last));
  MlpWorkspace workspace;
  LB2_RETURN_IF_ERROR(
      lay_out_mlp(mlp, m, dtype, std::max(first.workspace_bytes, last.workspace_bytes), &workspace));
  *out = {sizeof *out, workspace.bytes, first, last};
  return LB2_OK;
}
