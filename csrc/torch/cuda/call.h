// What calls of the CUDA library have in common: the GPU, its stream, layers of an operator's lists.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "littlebit2/cuda.h"
#include "torch/layers.h"

namespace lb2::torch_ops {

void* current_stream(int32_t gpu);

// Properties of a GPU do not change: they are queried once per thread.
lb2_cuda_device describe_gpu(int32_t gpu);

// Sets the rows of x in `layers`, which have all fields set but m, dtype, input and output.
Rows set_input(std::vector<lb2_linear_args>& layers, const Tensor& x, const Place& place);

// The GPU of a tensor. Torch dispatches to CUDA if any tensor is there; the others may be elsewhere.
Place gpu_of(const char* name, const Tensor& tensor);

// Several layers of an operator's lists; they point into `storage`.
std::vector<lb2_linear_args> set_layers(const std::vector<LayerTensors>& tensors, const Biases& bias,
                                        std::vector<lb2_path>& storage, const Place& place);

}  // namespace lb2::torch_ops
