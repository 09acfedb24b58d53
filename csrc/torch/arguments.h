// Tensors in, arguments of the C ABI out: what the operators share. Every error names the argument, what was expected
// and what was got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "littlebit2/littlebit2.h"

namespace lb2::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensors = std::optional<std::vector<Tensor>>;
using Paths = std::array<lb2_path, LB2_MAX_PATHS>;

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  message << "littlebit2: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_of(const Tensor& tensor);

// Raises lb2_last_error() unless the call succeeded.
void throw_on_error(lb2_status status);

// Data of a scale: [size], or [1, size] as checkpoints store them.
const float* scale_data(const std::string& name, const Tensor& scale, int64_t size);

// Fills the layer's part of `args`: sizes and paths, which point into the tensors.
void set_layer(lb2_linear_args& args, Paths& paths, const std::vector<Tensor>& v, const OptionalTensors& u,
               const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
               const std::vector<Tensor>& out_scale);

// Activations [..., columns] as rows of a matrix.
struct Rows {
  Tensor tensor;  // `input`, or a dense copy where its rows cannot be addressed
  int64_t count, stride;
  lb2_dtype dtype;
};
Rows rows_of(const char* name, const Tensor& input, int64_t columns);

// An uninitialised [..., columns] for the rows of `input`.
Tensor new_output(const Tensor& input, int64_t columns);

// torch's thread pool as an lb2_parallel_for.
int32_t torch_parallel(void* context, int64_t n, int64_t grain, lb2_task task, void* task_context);

}  // namespace lb2::torch_ops
