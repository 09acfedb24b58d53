// The operators on CUDA tensors: arguments of the C ABI, device guard, stream. A library of its own, loaded
// only where torch has CUDA; it is compiled without torch's CUDA headers or libraries, against any build of
// torch.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "littlebit2/cuda.h"
#include "torch/arguments.h"

namespace lb2::torch_ops {
namespace {

// aoti_torch_get_current_cuda_stream: part of the stable shim, but only in libtorch_cuda, which is not there
// to link with when torch is a CPU build. Where there are CUDA tensors, it is loaded.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  LB2_CHECK(symbol != nullptr, "torch's current CUDA stream cannot be asked for: ",
            library == nullptr ? "libtorch_cuda.so is not loaded"
                               : "libtorch_cuda.so lacks aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(symbol);
}

void* current_stream(int32_t gpu) {
  static const CurrentStream find = find_current_stream();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(find(gpu, &stream));
  return stream;
}

// Properties of a GPU do not change: asked for once per thread.
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

Tensor linear_cuda(const Tensor& x, const std::vector<Tensor>& v, const OptionalTensors& u,
                   const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                   const std::vector<Tensor>& out_scale, const std::optional<Tensor>& bias,
                   int64_t activation) {
  const lb2_activation mode = activation_mode(activation);
  // One CUDA tensor is enough to get here with the others elsewhere.
  LB2_CHECK(x.is_cuda(), "x must be on the GPU that holds the layer, got a tensor elsewhere");
  const Place place = {false, x.get_device_index()};
  lb2_linear_args args = {};
  Paths paths;
  set_layer(args, paths, v, u, in_scale, latent_scale, out_scale, place);
  if (bias) args.bias = scale_data(Name{"bias"}, *bias, args.n, place);
  const torch::stable::accelerator::DeviceGuard guard(place.gpu);
  const Rows rows = rows_of("x", x, args.k, place);
  args.dtype = rows.dtype;
  args.m = rows.count;
  args.input = rows.tensor.const_data_ptr();
  args.input_stride = rows.stride;

  const lb2_cuda_device device = describe_gpu(place.gpu);
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  throw_on_error(lb2_linear_plan_cuda(&args, mode, &device, nullptr, &plan));
  Tensor output = new_output(x, args.n);
  args.output = output.mutable_data_ptr();
  args.output_stride = args.n;
  // Given back on return: the allocator hands it out again in the order of this stream.
  Tensor workspace = new_bytes(x, plan.workspace_bytes);
  args.workspace = workspace.mutable_data_ptr();
  args.workspace_bytes = plan.workspace_bytes;
  throw_on_error(lb2_linear_forward_cuda(&args, &plan, current_stream(place.gpu)));
  return output;
}

Tensor linear_backward_x_cuda(const Tensor&, const std::vector<Tensor>&, const OptionalTensors&,
                              const std::vector<Tensor>&, const OptionalTensors&,
                              const std::vector<Tensor>&) {
  raise(
      "gradients of x are not available from the CUDA kernels; ask for backend='triton', move x and the "
      "layer to "
      "the CPU, or ask for backend='reference' (plain PyTorch on unpacked signs)");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(littlebit2, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear_cuda));
  m.impl("linear_backward_x", TORCH_BOX(&linear_backward_x_cuda));
}

}  // namespace lb2::torch_ops
