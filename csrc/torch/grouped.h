// Operators on several layers of packed words with one input, on the CPU: the layers run one after another.
#pragma once

#include "torch/layers.h"

namespace lb2::torch_ops {

std::vector<Tensor> grouped_linear_cpu(const Tensor& x, const std::vector<Tensor>& v,
                                       const OptionalTensors& u, const std::vector<Tensor>& in_scale,
                                       const OptionalTensors& latent_scale,
                                       const std::vector<Tensor>& out_scale, const Biases& bias,
                                       const std::vector<int64_t>& paths, int64_t activation);

// The same, all side by side in one [..., sum N_i].
Tensor joined_linear_cpu(const Tensor& x, const std::vector<Tensor>& v, const OptionalTensors& u,
                         const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                         const std::vector<Tensor>& out_scale, const Biases& bias,
                         const std::vector<int64_t>& paths, int64_t activation);

}  // namespace lb2::torch_ops
