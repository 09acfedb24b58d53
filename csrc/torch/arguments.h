// Converts tensors to arguments of the C ABI, for all operators. Every error names the argument, what was
// expected and what was got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "littlebit2/cuda.h"
#include "littlebit2/littlebit2.h"

namespace lb2::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensors = std::optional<std::vector<Tensor>>;
using Paths = std::array<lb2_path, LB2_MAX_PATHS>;

// Name of a tensor in messages: "bias", or "v[1]" for an element of a list.
struct Name {
  const char* text;
  int64_t index = -1;
};
inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.text;
  return name.index < 0 ? out : out << '[' << name.index << ']';
}

template <typename... Parts>
[[noreturn, gnu::noinline]] void raise(const Parts&... parts) {
  std::ostringstream message;
  message << "littlebit2: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Raises with the parts of a message unless the condition holds. A macro, because evaluating the parts costs
// more than a small layer.
#define LB2_CHECK(condition, ...)                           \
  do {                                                      \
    if (!(condition)) ::lb2::torch_ops::raise(__VA_ARGS__); \
  } while (false)

std::string shape_of(const Tensor& tensor);

// Raises lb2_last_error() unless the call succeeded.
void throw_on_error(lb2_status status);

// Where the tensors of a call are: the CPU, or one GPU.
struct Place {
  bool cpu;
  int32_t gpu;  // the index of a CUDA device; ignored on the CPU
};
constexpr Place kCpu = {true, 0};

// The data of a scale of shape [size], or [1, size] as in checkpoints.
const float* scale_data(const Name& name, const Tensor& scale, int64_t size, const Place& place);

// The tensors of a layer: `count` of each list, from index `first` on.
struct LayerTensors {
  const std::vector<Tensor>& v;
  const OptionalTensors& u;
  const std::vector<Tensor>& in_scale;
  const OptionalTensors& latent_scale;
  const std::vector<Tensor>& out_scale;
  size_t first, count;
};

// All paths of the lists, after checking that the lists have equal lengths.
LayerTensors all_paths(const std::vector<Tensor>& v, const OptionalTensors& u,
                       const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                       const std::vector<Tensor>& out_scale);

// Fills the layer's part of `args`: sizes and paths, which point into the tensors. `paths` has room for them.
void set_layer(lb2_linear_args& args, lb2_path* paths, const LayerTensors& tensors, const Place& place);

// The shape of a layer whose `args` are set. Raises for what set_layer leaves to the core to check.
lb2_layer_shape shape_of_layer(const lb2_linear_args& args);

// The lb2_activation of an operator's argument. Each kernel refuses the modes that it does not support.
lb2_activation activation_mode(int64_t activation);

// Activations [..., columns] as rows of a matrix.
struct Rows {
  Tensor tensor;  // `input`, or a dense copy where its rows cannot be addressed
  int64_t count, stride;
  lb2_dtype dtype;
};
Rows rows_of(const char* name, const Tensor& input, int64_t columns, const Place& place);

inline int64_t element_bytes(lb2_dtype dtype) { return dtype == LB2_FLOAT32 ? 4 : 2; }

// An uninitialized [..., columns] for the rows of `input`, on its device.
Tensor new_output(const Tensor& input, int64_t columns);

// Uninitialized bytes on the device of `input`.
Tensor new_bytes(const Tensor& input, int64_t bytes);

// torch's thread pool as an lb2_parallel_for.
int32_t torch_parallel(void* context, int64_t n, int64_t grain, lb2_task task, void* task_context);

}  // namespace lb2::torch_ops
