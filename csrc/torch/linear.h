// The operators on packed words of library.cpp: they convert tensors to arguments of the C ABI. No kernel
// code here.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

// y[..., N] for x[..., K] with exact sums; see the schema in library.cpp.
Tensor linear_cpu(const Tensor& x, const std::vector<Tensor>& v, const OptionalTensors& u,
                  const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                  const std::vector<Tensor>& out_scale, const std::optional<Tensor>& bias,
                  int64_t activation);

// Gradient of x[..., K] from the gradient of y[..., N].
Tensor linear_backward_x_cpu(const Tensor& grad, const std::vector<Tensor>& v, const OptionalTensors& u,
                             const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                             const std::vector<Tensor>& out_scale);

// Parts of linear_cpu. The first raises unless the mode is supported for packed words on the CPU; the others
// run the layer that `args` describe, the last into rows `stride` elements apart.
void check_portable_activation(int64_t activation);
Tensor forward_cpu(lb2_linear_args& args, const Tensor& x);
void forward_into_cpu(lb2_linear_args& args, const Tensor& x, void* output, int64_t stride);

}  // namespace lb2::torch_ops
