// Attention of few queries on the CPU: littlebit2::attention.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

Tensor attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                     const std::optional<Tensor>& mask, double scale, double softcap, bool causal,
                     int64_t window);

}  // namespace lb2::torch_ops
