// A step of decoding on the CPU, rotation, cache and attention: littlebit2::attention_step.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

Tensor attention_step_cpu(const Tensor& query, const Tensor& new_key, const Tensor& new_value,
                          const Tensor& cos, const Tensor& sin, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& position, const std::optional<Tensor>& mask,
                          double scale, double softcap, bool causal, int64_t window, bool interleaved);

}  // namespace lb2::torch_ops
