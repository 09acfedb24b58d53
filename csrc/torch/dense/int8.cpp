#include "torch/dense/int8.h"

#include "torch/dense/int8_rows.h"

namespace lb2::torch_ops {

Tensor int8_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale,
                       const std::optional<Tensor>& bias) {
  LB2_CHECK(weight.is_cpu(), "weight must be on the CPU like x");
  lb2_int8_args args = int8_rows(weight, scale, bias, kCpu);
  const Rows rows = set_int8_input(args, x, kCpu);
  Tensor output = new_output(x, args.n);
  args.output = output.mutable_data_ptr();
  args.output_stride = args.n;
  throw_on_error(lb2_int8_workspace_cpu(args.m, args.k, &args.workspace_bytes));
  Tensor workspace = new_bytes(x, args.workspace_bytes);
  args.workspace = workspace.mutable_data_ptr();
  args.parallel_for = torch_parallel;
  throw_on_error(lb2_int8_forward_cpu(&args));
  return output;
}

}  // namespace lb2::torch_ops
