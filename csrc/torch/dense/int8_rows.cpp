#include "torch/dense/int8_rows.h"

namespace lb2::torch_ops {

lb2_int8_args int8_rows(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                        const Place& place) {
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
  args.scale = scale_data(Name{"scale"}, scale, args.n, place);
  if (bias) args.bias = scale_data(Name{"bias"}, *bias, args.n, place);
  return args;
}

Rows set_int8_input(lb2_int8_args& args, const Tensor& x, const Place& place) {
  Rows rows = rows_of("x", x, args.k, place);
  args.m = rows.count;
  args.input = rows.tensor.const_data_ptr();
  args.input_stride = rows.stride;
  args.dtype = rows.dtype;
  return rows;
}

}  // namespace lb2::torch_ops
