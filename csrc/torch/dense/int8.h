// Dense int8 rows on the CPU: littlebit2::int8_linear.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

Tensor int8_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale,
                       const std::optional<Tensor>& bias);

}  // namespace lb2::torch_ops
