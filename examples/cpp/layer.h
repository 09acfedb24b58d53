// A packed linear layer of a checkpoint (docs/format.md), in the layout of the CPU kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "littlebit2/littlebit2.h"
#include "safetensors.h"
#include "thread_pool.h"

// Room for the calls of one thread; it grows to what its largest call needs.
using Workspace = std::vector<unsigned char>;

class Layer {
 public:
  // Loads the layer called `name` ("model.layers.0.mlp.up_proj"), complete. Throws std::runtime_error, which
  // names the tensor that is missing, unexpected or wrong.
  Layer(const SafetensorsFile& file, const std::string& name, ThreadPool& pool);

  int64_t in_features() const { return shape_.k; }
  int64_t out_features() const { return shape_.n; }
  int64_t paths() const { return shape_.num_paths; }
  int64_t bytes() const { return bytes_; }

  // y [M, N] = layer(x [M, K]), both contiguous and of `dtype`. Any number of threads may call this together,
  // each with a workspace of its own. Throws std::runtime_error.
  void forward(lb2_dtype dtype, int64_t m, const void* x, void* y, ThreadPool& pool,
               Workspace& workspace) const;

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  lb2_layer_shape shape_{};
  std::vector<float> bias_;
  std::unique_ptr<void, Free> packed_;
  int64_t bytes_ = 0;
};
