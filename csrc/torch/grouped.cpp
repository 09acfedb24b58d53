#include "torch/grouped.h"

#include "torch/linear.h"
#include "torch/prepacked.h"

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

std::vector<Tensor> grouped_linear_prepacked_cpu(const Tensor& x, const std::vector<Tensor>& layers,
                                                 const Biases& bias, const std::vector<int64_t>& out_features,
                                                 int64_t activation) {
  LB2_CHECK(!layers.empty(), "layers must not be empty");
  LB2_CHECK(bias.size() == layers.size(), "bias must hold one tensor or None per layer (", layers.size(),
            "), got ", bias.size());
  LB2_CHECK(out_features.size() == layers.size(), "out_features must hold one number per layer (",
            layers.size(), "), got ", out_features.size());
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < layers.size(); ++i)
    outputs.push_back(linear_prepacked_cpu(x, layers[i], bias[i], out_features[i], activation));
  return outputs;
}

}  // namespace lb2::torch_ops
