// Tensors of int8_linear to arguments of the C ABI, on any device.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

// Everything but the input, the output and the workspace. The device of weight must have been checked.
lb2_int8_args int8_rows(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
                        const Place& place);

// Adds the rows of x, which must live as long as the call.
Rows set_int8_input(lb2_int8_args& args, const Tensor& x, const Place& place);

}  // namespace lb2::torch_ops
