// What littlebit2::unpack returns, on any device.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

// [first, last] as lb2_linear_unpack_cuda (cuda.h) has them, or [last] of a layer of a single stage: outputs,
// uninitialized, on the device of `like`. `args` are those of set_layer; sets their dtype, an lb2_dtype.
std::vector<Tensor> new_factors(lb2_linear_args& args, const Tensor& like, int64_t dtype);

}  // namespace lb2::torch_ops
