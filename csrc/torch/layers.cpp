#include "torch/layers.h"

#include <algorithm>

namespace lb2::torch_ops {

std::vector<LayerTensors> split_layers(const std::vector<Tensor>& v, const OptionalTensors& u,
                                       const std::vector<Tensor>& in_scale,
                                       const OptionalTensors& latent_scale,
                                       const std::vector<Tensor>& out_scale, const Biases& bias,
                                       const std::vector<int64_t>& paths) {
  LB2_CHECK(!paths.empty(), "paths must hold the number of paths of each layer, got none");
  LB2_CHECK(bias.size() == paths.size(), "bias must hold one tensor or None per layer (", paths.size(),
            "), got ", bias.size());
  const LayerTensors all = all_paths(v, u, in_scale, latent_scale, out_scale);
  std::vector<LayerTensors> layers;
  layers.reserve(paths.size());
  size_t first = 0;
  for (size_t i = 0; i < paths.size(); ++i) {
    const int64_t left = static_cast<int64_t>(all.count - first);
    LB2_CHECK(paths[i] >= 1 && paths[i] <= LB2_MAX_PATHS && paths[i] <= left,
              Name{"paths", static_cast<int64_t>(i)}, " must be between 1 and ",
              std::min<int64_t>(LB2_MAX_PATHS, left), " with ", all.count, " tensors in v, got ", paths[i]);
    const size_t count = static_cast<size_t>(paths[i]);
    layers.push_back({v, u, in_scale, latent_scale, out_scale, first, count});
    first += count;
  }
  LB2_CHECK(first == all.count, "paths must add up to the ", all.count, " tensors of v, got ", first);
  return layers;
}

const float* bias_data(const Biases& bias, size_t i, int64_t size, const Place& place) {
  if (!bias[i]) return nullptr;
  return scale_data(Name{"bias", static_cast<int64_t>(i)}, *bias[i], size, place);
}

}  // namespace lb2::torch_ops
