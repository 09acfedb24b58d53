// The operators of library.cpp on several prepacked layers in one parallel region.
#pragma once

#include "torch/layers.h"

namespace lb2::torch_ops {

// An output for each of several layers on one x.
std::vector<Tensor> grouped_linear_prepacked_cpu(const Tensor& x, const std::vector<Tensor>& layers,
                                                 const Biases& bias, const std::vector<int64_t>& out_features,
                                                 int64_t activation);

// The same of the normalized x, if there is a norm (the weight of an lb2_norm), plus the residual [..., N] of
// one layer.
std::vector<Tensor> fused_linear_prepacked_cpu(const Tensor& x, const std::vector<Tensor>& layers,
                                               const Biases& bias, const std::vector<int64_t>& out_features,
                                               const std::optional<Tensor>& norm, double eps, double offset,
                                               const std::optional<Tensor>& residual, int64_t activation);

// An MLP: gate, up and down, or up and down; `function` is an lb2_function, out_features that of down.
Tensor mlp_prepacked_cpu(const Tensor& x, const std::vector<Tensor>& layers, const Biases& bias,
                         int64_t out_features, int64_t function, const std::optional<Tensor>& norm,
                         double eps, double offset, const std::optional<Tensor>& residual,
                         int64_t activation);

}  // namespace lb2::torch_ops
