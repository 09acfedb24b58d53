#include "torch/dense/int8.h"

namespace lb2::torch_ops {

Tensor int8_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale,
                       const std::optional<Tensor>& bias) {
  LB2_CHECK(weight.is_cpu(), "weight must be on the CPU like x");
  LB2_CHECK(weight.scalar_type() == ScalarType::Char && weight.dim() == 2 && weight.size(0) >= 1 &&
                weight.size(1) >= 1,
            "weight must be int8 [N, K], got ", torch::headeronly::toString(weight.scalar_type()), " ",
            shape_of(weight));
  LB2_CHECK(weight.size(1) == 1 || weight.stride(1) == 1, "weight must have contiguous rows, got stride ",
            weight.stride(1));
  lb2_int8_args args = {};
  args.struct_size = sizeof args;
  args.n = weight.size(0);
  args.k = weight.size(1);
  args.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  args.weight_stride = args.n == 1 ? args.k : weight.stride(0);
  args.scale = scale_data(Name{"scale"}, scale, args.n, kCpu);
  if (bias) args.bias = scale_data(Name{"bias"}, *bias, args.n, kCpu);
  const Rows rows = rows_of("x", x, args.k, kCpu);
  args.m = rows.count;
  args.input = rows.tensor.const_data_ptr();
  args.input_stride = rows.stride;
  args.dtype = rows.dtype;
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
