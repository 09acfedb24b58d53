// The operators on CUDA tensors: arguments of the C ABI, device guard, stream. The gradient of x is computed
// with unpack, in Python (littlebit2_kernels/ops/dense.py). This is a separate library, loaded only if torch
// has CUDA. It is compiled without torch's CUDA headers and libraries, against any build of torch.
#include <torch/csrc/stable/library.h>

#include "torch/cuda/call.h"
#include "torch/dense/factors.h"

namespace lb2::torch_ops {
namespace {

// Runs `count` layers whose input and output are set, in launches that they share.
void launch(lb2_linear_args* layers, size_t count, const Tensor& x, const Place& place, lb2_activation mode) {
  std::vector<lb2_layer_shape> shapes;
  shapes.reserve(count);
  for (size_t i = 0; i < count; ++i) shapes.push_back(shape_of_layer(layers[i]));
  const lb2_cuda_device device = describe_gpu(place.gpu);
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  const int64_t signed_count = static_cast<int64_t>(count);
  throw_on_error(lb2_grouped_plan_cuda(shapes.data(), signed_count, layers[0].m, layers[0].dtype, mode,
                                       &device, nullptr, &plan));
  // Freed on return, which is safe: the allocator reuses it in the order of this stream.
  Tensor workspace = new_bytes(x, plan.workspace_bytes);
  layers[0].workspace = workspace.mutable_data_ptr();
  layers[0].workspace_bytes = plan.workspace_bytes;
  throw_on_error(lb2_grouped_forward_cuda(layers, signed_count, &plan, current_stream(place.gpu)));
}

// The same for any number of paths: in one call where the kernels take them all.
void launch_all(std::vector<lb2_linear_args>& layers, const Tensor& x, const Place& place,
                lb2_activation mode) {
  int64_t paths = 0;
  for (const lb2_linear_args& args : layers) paths += args.num_paths;
  if (paths <= LB2_MAX_PATHS) return launch(layers.data(), layers.size(), x, place, mode);
  for (lb2_linear_args& args : layers) launch(&args, 1, x, place, mode);
}

// Runs layers on the rows of x and returns one output each. `layers` have all fields set but m, dtype, input
// and output.
std::vector<Tensor> forward_cuda(std::vector<lb2_linear_args>& layers, const Tensor& x, const Place& place,
                                 lb2_activation mode) {
  const torch::stable::accelerator::DeviceGuard guard(place.gpu);
  const Rows rows = set_input(layers, x, place);
  std::vector<Tensor> outputs;
  outputs.reserve(layers.size());
  for (lb2_linear_args& args : layers) {
    outputs.push_back(new_output(x, args.n));
    args.output = outputs.back().mutable_data_ptr();
    args.output_stride = args.n;
  }
  launch_all(layers, x, place, mode);
  return outputs;
}

// The same into slices of one output [..., sum N_i].
Tensor forward_joined_cuda(std::vector<lb2_linear_args>& layers, const Tensor& x, const Place& place,
                           lb2_activation mode) {
  const torch::stable::accelerator::DeviceGuard guard(place.gpu);
  const Rows rows = set_input(layers, x, place);
  int64_t total = 0;
  for (const lb2_linear_args& args : layers) total += args.n;
  Tensor output = new_output(x, total);
  char* slice = static_cast<char*>(output.mutable_data_ptr());
  for (lb2_linear_args& args : layers) {
    args.output = slice;
    args.output_stride = total;
    slice += args.n * element_bytes(rows.dtype);
  }
  launch_all(layers, x, place, mode);
  return output;
}

Tensor linear_cuda(const Tensor& x, const std::vector<Tensor>& v, const OptionalTensors& u,
                   const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                   const std::vector<Tensor>& out_scale, const std::optional<Tensor>& bias,
                   int64_t activation) {
  const lb2_activation mode = activation_mode(activation);
  const Place place = gpu_of("x", x);
  std::vector<lb2_linear_args> layers(1);
  Paths paths;
  set_layer(layers[0], paths.data(), all_paths(v, u, in_scale, latent_scale, out_scale), place);
  if (bias) layers[0].bias = scale_data(Name{"bias"}, *bias, layers[0].n, place);
  return forward_cuda(layers, x, place, mode)[0];
}

std::vector<Tensor> grouped_linear_cuda(const Tensor& x, const std::vector<Tensor>& v,
                                        const OptionalTensors& u, const std::vector<Tensor>& in_scale,
                                        const OptionalTensors& latent_scale,
                                        const std::vector<Tensor>& out_scale, const Biases& bias,
                                        const std::vector<int64_t>& paths, int64_t activation) {
  const lb2_activation mode = activation_mode(activation);
  const Place place = gpu_of("x", x);
  const std::vector<LayerTensors> tensors =
      split_layers(v, u, in_scale, latent_scale, out_scale, bias, paths);
  std::vector<lb2_path> storage(v.size());
  std::vector<lb2_linear_args> layers = set_layers(tensors, bias, storage, place);
  return forward_cuda(layers, x, place, mode);
}

Tensor joined_linear_cuda(const Tensor& x, const std::vector<Tensor>& v, const OptionalTensors& u,
                          const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                          const std::vector<Tensor>& out_scale, const Biases& bias,
                          const std::vector<int64_t>& paths, int64_t activation) {
  const lb2_activation mode = activation_mode(activation);
  const Place place = gpu_of("x", x);
  const std::vector<LayerTensors> tensors =
      split_layers(v, u, in_scale, latent_scale, out_scale, bias, paths);
  std::vector<lb2_path> storage(v.size());
  std::vector<lb2_linear_args> layers = set_layers(tensors, bias, storage, place);
  return forward_joined_cuda(layers, x, place, mode);
}

std::vector<Tensor> unpack_cuda(const std::vector<Tensor>& v, const OptionalTensors& u,
                                const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                                const std::vector<Tensor>& out_scale, int64_t dtype) {
  const LayerTensors tensors = all_paths(v, u, in_scale, latent_scale, out_scale);
  const Place place = gpu_of("v[0]", v[0]);
  lb2_linear_args args = {};
  Paths paths;
  set_layer(args, paths.data(), tensors, place);
  const torch::stable::accelerator::DeviceGuard guard(place.gpu);
  std::vector<Tensor> factors = new_factors(args, v[0], dtype);
  throw_on_error(lb2_linear_unpack_cuda(&args, factors.size() == 1 ? nullptr : factors[0].mutable_data_ptr(),
                                        factors.back().mutable_data_ptr(), current_stream(place.gpu)));
  return factors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(littlebit2, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear_cuda));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear_cuda));
  m.impl("joined_linear", TORCH_BOX(&joined_linear_cuda));
  m.impl("unpack", TORCH_BOX(&unpack_cuda));
}

}  // namespace lb2::torch_ops
