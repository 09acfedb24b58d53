#include "torch/fused.h"

#include <algorithm>
#include <array>

#include "torch/prepacked.h"
#include "torch/workspace.h"

namespace lb2::torch_ops {
namespace {

using Layers = std::array<lb2_prepacked_layer, LB2_MAX_LAYERS>;

// The layers without their biases, whose sizes the plan tells.
Layers layers_of(const std::vector<Tensor>& tensors, size_t first, size_t count) {
  Layers layers = {};
  for (size_t i = 0; i < count; ++i) {
    check_layer_tensor(tensors[first + i]);
    layers[i] = {tensors[first + i].const_data_ptr(), tensors[first + i].numel(), nullptr};
  }
  return layers;
}

void set_biases(Layers& layers, const Biases& bias, size_t first, size_t count, const lb2_fused_plan& plan) {
  for (size_t i = 0; i < count; ++i) layers[i].bias = bias_data(bias, first + i, plan.n[i], kCpu);
}

// An lb2_norm whose weight is not yet checked for its size.
lb2_norm norm_of(const Tensor& weight, double eps, double offset) {
  LB2_CHECK(weight.dim() == 1, "norm must have shape [K], got ", shape_of(weight));
  const Rows rows = rows_of("norm", weight, weight.numel(), kCpu);
  LB2_CHECK(weight.is_contiguous(), "norm must be contiguous");
  return {weight.const_data_ptr(), rows.dtype, static_cast<float>(eps), static_cast<float>(offset)};
}

// The fields that both kinds of arguments have.
template <typename Args>
void set_call(Args& args, const Rows& rows, int64_t activation) {
  args.struct_size = sizeof args;
  args.m = rows.count;
  args.input = rows.tensor.const_data_ptr();
  args.input_stride = rows.stride;
  args.dtype = rows.dtype;
  args.activation = prepacked_activation(activation);
  args.num_threads = static_cast<int32_t>(torch::stable::get_num_threads());
  args.parallel_for = torch_parallel;
}

lb2_fused_plan empty_plan() {
  lb2_fused_plan plan = {};
  plan.struct_size = sizeof plan;
  return plan;
}

void check_columns(const Tensor& x, const std::optional<Tensor>& norm, int64_t k) {
  LB2_CHECK(x.size(x.dim() - 1) == k, "x.size(-1) must equal ", k, ", got shape ", shape_of(x));
  if (norm) LB2_CHECK(norm->numel() == k, "norm must have shape [", k, "], got ", shape_of(*norm));
}

Rows residual_rows(const Tensor& residual, const Tensor& x, const Rows& input, int64_t n) {
  std::vector<int64_t> expected(x.sizes().begin(), x.sizes().end());
  expected.back() = n;
  const bool same = residual.dim() == x.dim() && std::equal(expected.begin(), expected.end(),
                                                            residual.sizes().begin(), residual.sizes().end());
  LB2_CHECK(same, "residual must have the shape of the output, the leading dimensions of x ", shape_of(x),
            " and ", n, ", got ", shape_of(residual));
  const Rows rows = rows_of("residual", residual, n, kCpu);
  LB2_CHECK(rows.dtype == input.dtype, "residual must have the dtype of x, ",
            torch::headeronly::toString(x.scalar_type()), ", got ",
            torch::headeronly::toString(residual.scalar_type()));
  return rows;
}

}  // namespace

std::vector<Tensor> fused_linear_prepacked_cpu(const Tensor& x, const std::vector<Tensor>& layers,
                                               const Biases& bias, const std::vector<int64_t>& out_features,
                                               const std::optional<Tensor>& norm, double eps, double offset,
                                               const std::optional<Tensor>& residual, int64_t activation) {
  check_counts(layers, bias, out_features);
  LB2_CHECK(!residual || layers.size() == 1, "residual must be None unless there is one layer, got ",
            layers.size(), " layers");
  const Rows rows = rows_for_prepacked(x);
  std::optional<lb2_norm> normalization;
  if (norm) normalization = norm_of(*norm, eps, offset);
  std::vector<Tensor> outputs;
  for (size_t first = 0; first < layers.size(); first += LB2_MAX_LAYERS) {
    const size_t count = std::min<size_t>(LB2_MAX_LAYERS, layers.size() - first);
    Layers storage = layers_of(layers, first, count);
    lb2_grouped_args args = {};
    set_call(args, rows, activation);
    args.layers = storage.data();
    args.num_layers = static_cast<int64_t>(count);
    args.norm = normalization ? &*normalization : nullptr;
    lb2_fused_plan plan = empty_plan();
    throw_on_error(lb2_grouped_plan_cpu(&args, &plan));
    args.isa = plan.isa;  // the choice of this process may change meanwhile
    check_columns(x, norm, plan.k);
    set_biases(storage, bias, first, count, plan);
    std::array<lb2_rows, LB2_MAX_LAYERS> targets = {};
    for (size_t i = 0; i < count; ++i) {
      const Name name = {"out_features", static_cast<int64_t>(first + i)};
      const int64_t expected = plan.n[i], got = out_features[first + i];
      LB2_CHECK(got == expected, name, " must be ", expected, " as the layer says, got ", got);
      outputs.push_back(new_output(x, expected));
      targets[i] = {outputs.back().mutable_data_ptr(), expected};
    }
    std::optional<Rows> added;
    if (residual) {
      added = residual_rows(*residual, x, rows, plan.n[0]);
      args.residual = added->tensor.const_data_ptr();
      args.residual_stride = added->stride;
    }
    args.outputs = targets.data();
    const Workspace workspace(plan.workspace_bytes);
    args.workspace = workspace.data();
    args.workspace_bytes = plan.workspace_bytes;
    throw_on_error(lb2_grouped_forward_cpu(&args));
  }
  return outputs;
}

std::vector<Tensor> grouped_linear_prepacked_cpu(const Tensor& x, const std::vector<Tensor>& layers,
                                                 const Biases& bias, const std::vector<int64_t>& out_features,
                                                 int64_t activation) {
  return fused_linear_prepacked_cpu(x, layers, bias, out_features, {}, 0.0, 0.0, {}, activation);
}

Tensor mlp_prepacked_cpu(const Tensor& x, const std::vector<Tensor>& layers, const Biases& bias,
                         int64_t out_features, int64_t function, const std::optional<Tensor>& norm,
                         double eps, double offset, const std::optional<Tensor>& residual,
                         int64_t activation) {
  LB2_CHECK(layers.size() == 2 || layers.size() == 3, "layers must hold (gate, up, down) or (up, down), got ",
            layers.size(), " layers");
  LB2_CHECK(bias.size() == layers.size(), "bias must hold one tensor or None per layer (", layers.size(),
            "), got ", bias.size());
  LB2_CHECK(function >= LB2_FUNCTION_SILU && function <= LB2_FUNCTION_RELU, "function must be between ",
            LB2_FUNCTION_SILU, " and ", LB2_FUNCTION_RELU, ", got ", function);
  const Rows rows = rows_for_prepacked(x);
  Layers storage = layers_of(layers, 0, layers.size());
  lb2_mlp_args args = {};
  set_call(args, rows, activation);
  args.layers = storage.data();
  args.num_layers = static_cast<int64_t>(layers.size());
  args.function = static_cast<lb2_function>(function);
  std::optional<lb2_norm> normalization;
  if (norm) normalization = norm_of(*norm, eps, offset);
  args.norm = normalization ? &*normalization : nullptr;
  lb2_fused_plan plan = empty_plan();
  throw_on_error(lb2_mlp_plan_cpu(&args, &plan));
  args.isa = plan.isa;
  check_columns(x, norm, plan.k);
  set_biases(storage, bias, 0, layers.size(), plan);
  const int64_t n = plan.n[layers.size() - 1];
  LB2_CHECK(out_features == n, "out_features must be ", n, " as the last layer says, got ", out_features);
  Tensor output = new_output(x, n);
  args.output = output.mutable_data_ptr();
  args.output_stride = n;
  std::optional<Rows> added;
  if (residual) {
    added = residual_rows(*residual, x, rows, n);
    args.residual = added->tensor.const_data_ptr();
    args.residual_stride = added->stride;
  }
  const Workspace workspace(plan.workspace_bytes);
  args.workspace = workspace.data();
  args.workspace_bytes = plan.workspace_bytes;
  throw_on_error(lb2_mlp_forward_cpu(&args));
  return output;
}

}  // namespace lb2::torch_ops
