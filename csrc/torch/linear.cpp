#include "torch/linear.h"

namespace lb2::torch_ops {
namespace {

using Call = lb2_status (*)(const lb2_linear_args*);

// Sets the rows of `input` [..., in_cols] in `args` and returns the bytes of workspace that their plan asks
// for.
int64_t set_input(lb2_linear_args& args, const Rows& rows, int64_t lb2_cpu_plan::* workspace_bytes) {
  args.dtype = rows.dtype;
  args.m = rows.count;
  args.input = rows.tensor.const_data_ptr();
  args.input_stride = rows.stride;
  const lb2_layer_shape shape = shape_of_layer(args);
  lb2_cpu_plan plan = {};
  plan.struct_size = sizeof plan;
  throw_on_error(lb2_linear_plan_cpu(&shape, args.m, args.isa, &plan));
  return plan.*workspace_bytes;
}

// Runs `call`, whose input is set, into rows `stride` elements apart.
void finish(lb2_linear_args& args, const Tensor& input, int64_t bytes, Call call, void* output,
            int64_t stride) {
  args.output = output;
  args.output_stride = stride;
  Tensor workspace = new_bytes(input, bytes);
  args.workspace = workspace.mutable_data_ptr();
  args.workspace_bytes = bytes;
  args.parallel_for = torch_parallel;
  throw_on_error(call(&args));
}

// Runs `call` on the rows of `input` [..., in_cols] and returns its output [..., out_cols].
Tensor run(lb2_linear_args& args, const char* name, const Tensor& input, int64_t in_cols, int64_t out_cols,
           Call call, int64_t lb2_cpu_plan::* workspace_bytes) {
  const Rows rows = rows_of(name, input, in_cols, kCpu);
  const int64_t bytes = set_input(args, rows, workspace_bytes);
  Tensor output = new_output(input, out_cols);
  finish(args, input, bytes, call, output.mutable_data_ptr(), out_cols);
  return output;
}

}  // namespace

void check_portable_activation(int64_t activation) {
  const lb2_activation mode = activation_mode(activation);
  LB2_CHECK(mode <= LB2_ACTIVATION_EXACT, "activation must be ", LB2_ACTIVATION_AUTO, " (auto) or ",
            LB2_ACTIVATION_EXACT, " (exact) for packed words on the CPU, got ", activation,
            mode == LB2_ACTIVATION_FLOAT16 ? ", which CUDA alone serves" : ", which needs a prepacked layer");
}

Tensor forward_cpu(lb2_linear_args& args, const Tensor& x) {
  return run(args, "x", x, args.k, args.n, lb2_linear_forward_cpu, &lb2_cpu_plan::forward_workspace_bytes);
}

void forward_into_cpu(lb2_linear_args& args, const Tensor& x, void* output, int64_t stride) {
  const Rows rows = rows_of("x", x, args.k, kCpu);
  const int64_t bytes = set_input(args, rows, &lb2_cpu_plan::forward_workspace_bytes);
  finish(args, x, bytes, lb2_linear_forward_cpu, output, stride);
}

Tensor linear_cpu(const Tensor& x, const std::vector<Tensor>& v, const OptionalTensors& u,
                  const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                  const std::vector<Tensor>& out_scale, const std::optional<Tensor>& bias,
                  int64_t activation) {
  check_portable_activation(activation);
  lb2_linear_args args = {};
  Paths paths;
  set_layer(args, paths.data(), all_paths(v, u, in_scale, latent_scale, out_scale), kCpu);
  if (bias) args.bias = scale_data(Name{"bias"}, *bias, args.n, kCpu);
  return forward_cpu(args, x);
}

Tensor linear_backward_x_cpu(const Tensor& grad, const std::vector<Tensor>& v, const OptionalTensors& u,
                             const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                             const std::vector<Tensor>& out_scale) {
  lb2_linear_args args = {};
  Paths paths;
  set_layer(args, paths.data(), all_paths(v, u, in_scale, latent_scale, out_scale), kCpu);
  return run(args, "grad", grad, args.n, args.k, lb2_linear_backward_x_cpu,
             &lb2_cpu_plan::backward_workspace_bytes);
}

}  // namespace lb2::torch_ops
