#include "torch/grouped.h"

#include "torch/linear.h"

namespace lb2::torch_ops {

std::vector<Tensor> grouped_linear_cpu(const Tensor& x, const std::vector<Tensor>& v,
                                       const OptionalTensors& u, const std::vector<Tensor>& in_scale,
                                       const OptionalTensors& latent_scale,
                                       const std::vector<Tensor>& out_scale, const Biases& bias,
                                       const std::vector<int64_t>& paths, int64_t activation) {
  check_portable_activation(activation);
  std::vector<Tensor> outputs;
  for (const LayerTensors& tensors : split_layers(v, u, in_scale, latent_scale, out_scale, bias, paths)) {
    lb2_linear_args args = {};
    Paths storage;
    set_layer(args, storage.data(), tensors, kCpu);
    args.bias = bias_data(bias, outputs.size(), args.n, kCpu);
    outputs.push_back(forward_cpu(args, x));
  }
  return outputs;
}

Tensor joined_linear_cpu(const Tensor& x, const std::vector<Tensor>& v, const OptionalTensors& u,
                         const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                         const std::vector<Tensor>& out_scale, const Biases& bias,
                         const std::vector<int64_t>& paths, int64_t activation) {
  check_portable_activation(activation);
  const std::vector<LayerTensors> tensors =
      split_layers(v, u, in_scale, latent_scale, out_scale, bias, paths);
  std::vector<lb2_linear_args> layers(tensors.size());
  std::vector<lb2_path> storage(v.size());
  int64_t total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    set_layer(layers[i], storage.data() + tensors[i].first, tensors[i], kCpu);
    layers[i].bias = bias_data(bias, i, layers[i].n, kCpu);
    total += layers[i].n;
  }
  const Rows rows = rows_of("x", x, layers[0].k, kCpu);
  Tensor output = new_output(x, total);
  char* slice = static_cast<char*>(output.mutable_data_ptr());
  for (lb2_linear_args& args : layers) {
    forward_into_cpu(args, x, slice, total);
    slice += args.n * element_bytes(rows.dtype);
  }
  return output;
}

}  // namespace lb2::torch_ops
