// littlebit2::unpack: a layer as dense matrices, for torch's matrix products.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

// See the schema in library.cpp.
std::vector<Tensor> unpack_cpu(const std::vector<Tensor>& v, const OptionalTensors& u,
                               const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                               const std::vector<Tensor>& out_scale, int64_t dtype);

}  // namespace lb2::torch_ops
