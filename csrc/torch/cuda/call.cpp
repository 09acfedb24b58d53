#include "torch/cuda/call.h"

#include <dlfcn.h>

namespace lb2::torch_ops {
namespace {

// aoti_torch_get_current_cuda_stream is part of the stable shim, but only in libtorch_cuda, with which a
// build against a CPU torch cannot link. It is loaded wherever there are CUDA tensors.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  LB2_CHECK(symbol != nullptr, "torch's current CUDA stream cannot be asked for: ",
            library == nullptr ? "libtorch_cuda.so is not loaded"
                               : "libtorch_cuda.so lacks aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(symbol);
}

}  // namespace

void* current_stream(int32_t gpu) {
  static const CurrentStream find = find_current_stream();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(find(gpu, &stream));
  return stream;
}

lb2_cuda_device describe_gpu(int32_t gpu) {
  thread_local std::vector<lb2_cuda_device> known;
  const size_t index = static_cast<size_t>(gpu);
  if (index < known.size() && known[index].struct_size != 0) return known[index];
  lb2_cuda_device device = {};
  device.struct_size = sizeof device;
  throw_on_error(lb2_cuda_get_device(gpu, &device));
  if (known.size() <= index) known.resize(index + 1, lb2_cuda_device{});
  known[index] = device;
  return device;
}

Rows set_input(std::vector<lb2_linear_args>& layers, const Tensor& x, const Place& place) {
  Rows rows = rows_of("x", x, layers[0].k, place);
  for (lb2_linear_args& args : layers) {
    args.dtype = rows.dtype;
    args.m = rows.count;
    args.input = rows.tensor.const_data_ptr();
    args.input_stride = rows.stride;
  }
  return rows;
}

Place gpu_of(const char* name, const Tensor& tensor) {
  LB2_CHECK(tensor.is_cuda(), name, " must be on the GPU that holds the layer, got a tensor elsewhere");
  return {false, tensor.get_device_index()};
}

std::vector<lb2_linear_args> set_layers(const std::vector<LayerTensors>& tensors, const Biases& bias,
                                        std::vector<lb2_path>& storage, const Place& place) {
  std::vector<lb2_linear_args> layers(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    set_layer(layers[i], storage.data() + tensors[i].first, tensors[i], place);
    layers[i].bias = bias_data(bias, i, layers[i].n, place);
  }
  return layers;
}

}  // namespace lb2::torch_ops
