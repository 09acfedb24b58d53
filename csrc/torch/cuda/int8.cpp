// int8_linear on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include "torch/cuda/call.h"
#include "torch/dense/int8_rows.h"

namespace lb2::torch_ops {
namespace {

Tensor int8_linear_cuda(const Tensor& x, const Tensor& weight, const Tensor& scale,
                        const std::optional<Tensor>& bias) {
  const Place place = gpu_of("x", x);
  LB2_CHECK(weight.is_cuda() && weight.get_device_index() == place.gpu,
            "weight must be on the GPU of x, got a tensor elsewhere");
  lb2_int8_args args = int8_rows(weight, scale, bias, place);
  const torch::stable::accelerator::DeviceGuard guard(place.gpu);
  const Rows rows = set_int8_input(args, x, place);
  Tensor output = new_output(x, args.n);
  args.output = output.mutable_data_ptr();
  args.output_stride = args.n;
  throw_on_error(lb2_int8_forward_cuda(&args, current_stream(place.gpu)));
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(littlebit2, CUDA, m) { m.impl("int8_linear", TORCH_BOX(&int8_linear_cuda)); }

}  // namespace lb2::torch_ops
