// littlebit2::unpack: a layer as dense matrices, for torch's matrix products.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

// [first, last] as lb2_linear_unpack_cuda (cuda.h) has them, or [last] of a layer of a single stage: outputs,
// uninitialised, on the device of `like`. `args` are those of set_layer; sets their dtype, an lb2_dtype.
std::vector<Tensor> new_factors(lb2_linear_args& args, const Tensor& like, int64_t dtype);

std::vector<Tensor> unpack_cpu(const std::vector<Tensor>& v, const OptionalTensors& u,
                               const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                               const std::vector<Tensor>& out_scale, int64_t dtype);

}  // namespace lb2::torch_ops
