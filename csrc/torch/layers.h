// Splits the tensor lists of an operator on several layers, which hold the tensors of one layer after
// another.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

using Biases = std::vector<std::optional<Tensor>>;

// The layers of a call, `paths[i]` tensors of each list for layer i.
std::vector<LayerTensors> split_layers(const std::vector<Tensor>& v, const OptionalTensors& u,
                                       const std::vector<Tensor>& in_scale,
                                       const OptionalTensors& latent_scale,
                                       const std::vector<Tensor>& out_scale, const Biases& bias,
                                       const std::vector<int64_t>& paths);

// The bias of layer i, or NULL.
const float* bias_data(const Biases& bias, size_t i, int64_t size, const Place& place);

}  // namespace lb2::torch_ops
