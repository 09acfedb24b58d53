#include "torch/prepacked.h"

#include <algorithm>

#include "torch/linear.h"
#include "torch/workspace.h"

namespace lb2::torch_ops {
namespace {

lb2_layer_shape shape_of_prepacked(const Tensor& layer) {
  check_layer_tensor(layer);
  lb2_layer_shape shape;
  shape.struct_size = sizeof shape;
  throw_on_error(lb2_prepacked_shape_cpu(layer.const_data_ptr(), layer.numel(), &shape));
  return shape;
}

template <typename T>
T* data_of(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

struct Operands {
  std::vector<Tensor> v, u, in_scale, latent_scale, out_scale;
};

// With `share`, paths that share a first stage get one tensor for it, else one each.
Operands unprepack(const Tensor& layer, const lb2_layer_shape& layer_shape, bool share) {
  const auto words = [&](int64_t rows, int64_t cols) {
    const std::array<int64_t, 2> shape = {rows, lb2_words_per_row(cols)};
    return torch::stable::new_empty(layer, shape, ScalarType::Int);
  };
  const auto scale = [&](int64_t size) {
    const std::array<int64_t, 1> shape = {size};
    return torch::stable::new_empty(layer, shape, ScalarType::Float);
  };
  Operands operands;
  for (int64_t p = 0; p < layer_shape.num_paths; ++p) {
    const size_t leader = static_cast<size_t>(layer_shape.shares[p]);
    const bool shared = share && layer_shape.shares[p] != p;
    operands.v.push_back(shared ? operands.v[leader] : words(layer_shape.ranks[p], layer_shape.k));
    operands.in_scale.push_back(shared ? operands.in_scale[leader] : scale(layer_shape.k));
    operands.out_scale.push_back(scale(layer_shape.n));
    if (!layer_shape.single_stage) {
      operands.u.push_back(words(layer_shape.n, layer_shape.ranks[p]));
      operands.latent_scale.push_back(scale(layer_shape.ranks[p]));
    }
    throw_on_error(lb2_unprepack_cpu(
        layer.const_data_ptr(), layer.numel(), p, shared ? nullptr : data_of<int32_t>(operands.v.back()),
        layer_shape.single_stage ? nullptr : data_of<int32_t>(operands.u.back()),
        shared ? nullptr : data_of<float>(operands.in_scale.back()),
        layer_shape.single_stage ? nullptr : data_of<float>(operands.latent_scale.back()),
        data_of<float>(operands.out_scale.back()), torch_parallel, nullptr));
  }
  return operands;
}

// A checked call that lacks its output.
struct PrepackedCall {
  lb2_prepacked_args args;
  int64_t workspace_bytes;
};

PrepackedCall plan_prepacked(const Tensor& x, const Rows& rows, const Tensor& layer,
                             const std::optional<Tensor>& bias, const Name& size_name, int64_t out_features,
                             int64_t activation) {
  check_layer_tensor(layer);
  lb2_prepacked_args args = {};
  args.struct_size = sizeof args;
  args.layer = layer.const_data_ptr();
  args.layer_bytes = layer.numel();
  args.m = rows.count;
  args.input = rows.tensor.const_data_ptr();
  args.input_stride = rows.stride;
  args.dtype = rows.dtype;
  args.activation = prepacked_activation(activation);
  args.num_threads = static_cast<int32_t>(torch::stable::get_num_threads());
  args.parallel_for = torch_parallel;
  lb2_prepacked_plan plan = {};
  plan.struct_size = sizeof plan;
  throw_on_error(lb2_prepacked_plan_cpu(&args, &plan));
  args.isa = plan.isa;  // the choice of this process may change meanwhile
  LB2_CHECK(x.size(x.dim() - 1) == plan.k, "x.size(-1) must equal ", plan.k, ", got shape ", shape_of(x));
  LB2_CHECK(out_features == plan.n, size_name, " must be ", plan.n, " as the layer says, got ", out_features);
  if (bias) args.bias = scale_data(Name{"bias"}, *bias, plan.n, kCpu);
  return {args, plan.workspace_bytes};
}

// Writes rows of the output `stride` elements apart.
void run_prepacked(PrepackedCall& call, void* output, int64_t stride) {
  call.args.output = output;
  call.args.output_stride = stride;
  const Workspace workspace(call.workspace_bytes);
  call.args.workspace = workspace.data();
  call.args.workspace_bytes = call.workspace_bytes;
  throw_on_error(lb2_prepacked_forward_cpu(&call.args));
}

}  // namespace

lb2_activation prepacked_activation(int64_t activation) {
  LB2_CHECK((activation >= LB2_ACTIVATION_AUTO && activation <= LB2_ACTIVATION_SIGN) ||
                activation == LB2_ACTIVATION_INT8X2,
            "activation must be between ", LB2_ACTIVATION_AUTO, " and ", LB2_ACTIVATION_SIGN, ", or ",
            LB2_ACTIVATION_INT8X2, ", got ", activation);
  return static_cast<lb2_activation>(activation);
}

void check_layer_tensor(const Tensor& layer) {
  LB2_CHECK(layer.is_cpu(), "layer must be on the CPU");
  LB2_CHECK(layer.scalar_type() == ScalarType::Byte && layer.dim() == 1 && layer.is_contiguous(),
            "layer must be contiguous uint8 [bytes] as littlebit2::prepack returns it, got ",
            torch::headeronly::toString(layer.scalar_type()), " ", shape_of(layer));
}

// Activations of any width as rows; the layer's K is checked with the plan.
Rows rows_for_prepacked(const Tensor& x) {
  LB2_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x must have a last dimension of size K, got shape ",
            shape_of(x));
  return rows_of("x", x, x.size(x.dim() - 1), kCpu);
}

void check_counts(const std::vector<Tensor>& layers, const Biases& bias,
                  const std::vector<int64_t>& out_features) {
  LB2_CHECK(!layers.empty(), "layers must not be empty");
  LB2_CHECK(bias.size() == layers.size(), "bias must hold one tensor or None per layer (", layers.size(),
            "), got ", bias.size());
  LB2_CHECK(out_features.size() == layers.size(), "out_features must hold one number per layer (",
            layers.size(), "), got ", out_features.size());
}

Tensor prepack_cpu(const std::vector<Tensor>& v, const OptionalTensors& u,
                   const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                   const std::vector<Tensor>& out_scale) {
  lb2_linear_args args = {};
  Paths paths;
  set_layer(args, paths.data(), all_paths(v, u, in_scale, latent_scale, out_scale), kCpu);
  std::array<int64_t, 1> bytes = {0};
  throw_on_error(lb2_prepacked_bytes_cpu(&args, bytes.data()));
  Tensor layer = torch::stable::new_empty(out_scale[0], bytes, ScalarType::Byte);
  args.parallel_for = torch_parallel;
  throw_on_error(lb2_prepack_cpu(&args, layer.mutable_data_ptr(), bytes[0]));
  return layer;
}

std::vector<Tensor> unprepack_cpu(const Tensor& layer) {
  const lb2_layer_shape layer_shape = shape_of_prepacked(layer);
  const Operands operands = unprepack(layer, layer_shape, false);
  std::vector<Tensor> flat;
  for (size_t p = 0; p < static_cast<size_t>(layer_shape.num_paths); ++p) {
    flat.push_back(operands.v[p]);
    if (!layer_shape.single_stage) flat.push_back(operands.u[p]);
    flat.push_back(operands.in_scale[p]);
    if (!layer_shape.single_stage) flat.push_back(operands.latent_scale[p]);
    flat.push_back(operands.out_scale[p]);
  }
  return flat;
}

Tensor linear_prepacked_cpu(const Tensor& x, const Tensor& layer, const std::optional<Tensor>& bias,
                            int64_t out_features, int64_t activation) {
  const Rows rows = rows_for_prepacked(x);
  PrepackedCall call = plan_prepacked(x, rows, layer, bias, Name{"out_features"}, out_features, activation);
  Tensor output = new_output(x, out_features);
  run_prepacked(call, output.mutable_data_ptr(), out_features);
  return output;
}

Tensor joined_linear_prepacked_cpu(const Tensor& x, const std::vector<Tensor>& layers, const Biases& bias,
                                   const std::vector<int64_t>& out_features, int64_t activation) {
  check_counts(layers, bias, out_features);
  const Rows rows = rows_for_prepacked(x);
  std::vector<PrepackedCall> calls;
  calls.reserve(layers.size());
  int64_t total = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Name name = {"out_features", static_cast<int64_t>(i)};
    calls.push_back(plan_prepacked(x, rows, layers[i], bias[i], name, out_features[i], activation));
    total += out_features[i];
  }
  Tensor output = new_output(x, total);
  char* slice = static_cast<char*>(output.mutable_data_ptr());
  for (size_t i = 0; i < layers.size(); ++i) {
    run_prepacked(calls[i], slice, total);
    slice += out_features[i] * element_bytes(rows.dtype);
  }
  return output;
}

Tensor linear_prepacked_backward_x_cpu(const Tensor& grad, const Tensor& layer, int64_t in_features) {
  const lb2_layer_shape layer_shape = shape_of_prepacked(layer);
  LB2_CHECK(in_features == layer_shape.k, "in_features must be ", layer_shape.k, " as the layer says, got ",
            in_features);
  // The transposed product reads portable words. Unpacking costs about as much as the product of one token.
  const Operands operands = unprepack(layer, layer_shape, true);
  OptionalTensors u, latent_scale;
  if (!layer_shape.single_stage) {
    u = operands.u;
    latent_scale = operands.latent_scale;
  }
  return linear_backward_x_cpu(grad, operands.v, u, operands.in_scale, latent_scale, operands.out_scale);
}

}  // namespace lb2::torch_ops
