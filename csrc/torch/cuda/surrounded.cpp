// The operators on layers with what surrounds them in a decoder block, on CUDA tensors.
#include <torch/csrc/stable/library.h>

#include "torch/cuda/call.h"

namespace lb2::torch_ops {
namespace {

// Sets *norm for a weight that is given.
void set_norm(const std::optional<Tensor>& weight, double eps, double offset, int64_t columns,
              const Place& place, lb2_norm* norm, lb2_cuda_extras* extras) {
  if (!weight) return;
  const Rows rows = rows_of("norm", *weight, columns, place);
  LB2_CHECK(rows.count == 1 && weight->is_contiguous(), "norm must be contiguous [", columns, "], got ",
            shape_of(*weight));
  norm->weight = weight->const_data_ptr();
  norm->dtype = rows.dtype;
  norm->eps = static_cast<float>(eps);
  norm->offset = static_cast<float>(offset);
  extras->norm = norm;
}

// A residual [..., columns] for `count` tokens. Returns its rows, which must live as long as the call.
std::optional<Rows> set_residual(const std::optional<Tensor>& residual, const Rows& x, int64_t columns,
                                 const Place& place, lb2_cuda_extras* extras) {
  if (!residual) return std::nullopt;
  Rows rows = rows_of("residual", *residual, columns, place);
  LB2_CHECK(rows.dtype == x.dtype, "residual must have the dtype of x, ",
            torch::headeronly::toString(x.tensor.scalar_type()), ", got ",
            torch::headeronly::toString(residual->scalar_type()));
  LB2_CHECK(rows.count == x.count, "residual must hold a row for each of the ", x.count,
            " tokens of x, got shape ", shape_of(*residual));
  extras->residual = rows.tensor.const_data_ptr();
  extras->residual_stride = rows.stride;
  return rows;
}

std::vector<lb2_layer_shape> shapes_of(const std::vector<lb2_linear_args>& layers) {
  std::vector<lb2_layer_shape> shapes;
  shapes.reserve(layers.size());
  for (const lb2_linear_args& args : layers) shapes.push_back(shape_of_layer(args));
  return shapes;
}

// Freed on return, which is safe: the allocator reuses it in the order of this stream.
Tensor set_workspace(lb2_linear_args& args, const Tensor& x, int64_t bytes) {
  Tensor workspace = new_bytes(x, bytes);
  args.workspace = workspace.mutable_data_ptr();
  args.workspace_bytes = bytes;
  return workspace;
}

std::vector<Tensor> fused_linear_cuda(const Tensor& x, const std::vector<Tensor>& v, const OptionalTensors& u,
                                      const std::vector<Tensor>& in_scale,
                                      const OptionalTensors& latent_scale,
                                      const std::vector<Tensor>& out_scale, const Biases& bias,
                                      const std::vector<int64_t>& paths, const std::optional<Tensor>& norm,
                                      double eps, double offset, const std::optional<Tensor>& residual,
                                      int64_t activation) {
  const lb2_activation mode = activation_mode(activation);
  const Place place = gpu_of("x", x);
  const std::vector<LayerTensors> tensors =
      split_layers(v, u, in_scale, latent_scale, out_scale, bias, paths);
  std::vector<lb2_path> storage(v.size());
  std::vector<lb2_linear_args> layers = set_layers(tensors, bias, storage, place);
  const torch::stable::accelerator::DeviceGuard guard(place.gpu);
  const Rows rows = set_input(layers, x, place);
  lb2_norm normalization = {};
  lb2_cuda_extras extras = {};
  extras.struct_size = sizeof extras;
  set_norm(norm, eps, offset, layers[0].k, place, &normalization, &extras);
  LB2_CHECK(!residual || layers.size() == 1, "residual must be None for more than one layer, got one with ",
            layers.size(), " layers");
  const std::optional<Rows> added = set_residual(residual, rows, layers[0].n, place, &extras);
  std::vector<Tensor> outputs;
  outputs.reserve(layers.size());
  for (lb2_linear_args& args : layers) {
    outputs.push_back(new_output(x, args.n));
    args.output = outputs.back().mutable_data_ptr();
    args.output_stride = args.n;
  }
  const std::vector<lb2_layer_shape> shapes = shapes_of(layers);
  const lb2_cuda_device device = describe_gpu(place.gpu);
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  const int64_t count = static_cast<int64_t>(layers.size());
  throw_on_error(lb2_projections_plan_cuda(shapes.data(), count, rows.count, rows.dtype, mode, &device,
                                           nullptr, extras.norm != nullptr, &plan));
  const Tensor workspace = set_workspace(layers[0], x, plan.workspace_bytes);
  throw_on_error(
      lb2_projections_forward_cuda(layers.data(), count, &extras, &plan, current_stream(place.gpu)));
  return outputs;
}

Tensor mlp_cuda(const Tensor& x, const std::vector<Tensor>& v, const OptionalTensors& u,
                const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                const std::vector<Tensor>& out_scale, const Biases& bias, const std::vector<int64_t>& paths,
                int64_t function, const std::optional<Tensor>& norm, double eps, double offset,
                const std::optional<Tensor>& residual, int64_t activation) {
  const lb2_activation mode = activation_mode(activation);
  const Place place = gpu_of("x", x);
  const std::vector<LayerTensors> tensors =
      split_layers(v, u, in_scale, latent_scale, out_scale, bias, paths);
  std::vector<lb2_path> storage(v.size());
  std::vector<lb2_linear_args> layers = set_layers(tensors, bias, storage, place);
  const torch::stable::accelerator::DeviceGuard guard(place.gpu);
  const Rows rows = set_input(layers, x, place);
  lb2_linear_args& down = layers.back();
  lb2_norm normalization = {};
  lb2_cuda_extras extras = {};
  extras.struct_size = sizeof extras;
  set_norm(norm, eps, offset, layers[0].k, place, &normalization, &extras);
  const std::optional<Rows> added = set_residual(residual, rows, down.n, place, &extras);
  Tensor output = new_output(x, down.n);
  down.output = output.mutable_data_ptr();
  down.output_stride = down.n;
  const std::vector<lb2_layer_shape> shapes = shapes_of(layers);
  const lb2_cuda_device device = describe_gpu(place.gpu);
  lb2_cuda_mlp_plan plan = {};
  plan.struct_size = sizeof plan;
  const int64_t count = static_cast<int64_t>(layers.size());
  throw_on_error(lb2_mlp_plan_cuda(shapes.data(), count, rows.count, rows.dtype, mode, &device,
                                   extras.norm != nullptr, &plan));
  const Tensor workspace = set_workspace(layers[0], x, plan.workspace_bytes);
  throw_on_error(lb2_mlp_forward_cuda(layers.data(), count, static_cast<lb2_function>(function), &extras,
                                      &plan, current_stream(place.gpu)));
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(littlebit2, CUDA, m) {
  m.impl("fused_linear", TORCH_BOX(&fused_linear_cuda));
  m.impl("mlp", TORCH_BOX(&mlp_cuda));
}

}  // namespace lb2::torch_ops
