// The operators on prepacked layers of library.cpp.
#pragma once

#include "torch/layers.h"

namespace lb2::torch_ops {

// The prepacked layer, uint8 [bytes].
Tensor prepack_cpu(const std::vector<Tensor>& v, const OptionalTensors& u,
                   const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                   const std::vector<Tensor>& out_scale);

// v, u, in_scale, latent_scale, out_scale of every path in turn; v, in_scale, out_scale if there is no u.
std::vector<Tensor> unprepack_cpu(const Tensor& layer);

// y[..., N] for x[..., K]; `activation` is an lb2_activation.
Tensor linear_prepacked_cpu(const Tensor& x, const Tensor& layer, const std::optional<Tensor>& bias,
                            int64_t out_features, int64_t activation);

// Several layers on one x, side by side in one [..., sum N_i].
Tensor joined_linear_prepacked_cpu(const Tensor& x, const std::vector<Tensor>& layers, const Biases& bias,
                                   const std::vector<int64_t>& out_features, int64_t activation);

// Checks of arguments: the mode, a prepacked layer, the lists of several, activations of any width as rows
// (the layer's K is checked with the plan).
lb2_activation prepacked_activation(int64_t activation);
void check_layer_tensor(const Tensor& layer);
void check_counts(const std::vector<Tensor>& layers, const Biases& bias,
                  const std::vector<int64_t>& out_features);
Rows rows_for_prepacked(const Tensor& x);

// Gradient of x[..., K] from that of y[..., N], with exact sums.
Tensor linear_prepacked_backward_x_cpu(const Tensor& grad, const Tensor& layer, int64_t in_features);

}  // namespace lb2::torch_ops
