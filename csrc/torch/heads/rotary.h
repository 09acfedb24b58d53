// Rotary position embedding on the CPU: littlebit2::rotary.
#pragma once

#include <tuple>

#include "torch/arguments.h"

namespace lb2::torch_ops {

std::tuple<Tensor, Tensor> rotary_cpu(const Tensor& query, const Tensor& key, const Tensor& cos,
                                      const Tensor& sin, bool interleaved);

}  // namespace lb2::torch_ops
