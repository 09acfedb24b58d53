// The CUDA entry points of the C ABI: arguments checked, plan made, kernels queued. Nothing here waits.
#include <cuda_runtime.h>

#include <cinttypes>

#include "core/check.h"
#include "core/status.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace lb2::cuda {
namespace {

#define LB2_RETURN_IF_CUDA_ERROR(what, call)                              \
  do {                                                                    \
    const cudaError_t lb2_error_ = (call);                                \
    if (lb2_error_ != cudaSuccess) return cuda_failure(what, lb2_error_); \
  } while (false)

lb2_status cuda_failure(const char* what, cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice)
    return fail(
        LB2_ERROR_UNSUPPORTED,
        "%s: this build of liblittlebit2_cuda has no code for this GPU's architecture, and none that the "
        "driver could compile for it; rebuild with LB2_CUDA_ARCHS naming it",
        what);
  return fail(LB2_ERROR_INTERNAL, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

// Properties of one device do not change: they are asked for once.
constexpr int kMaxDevices = 64;

lb2_status query_device(int32_t ordinal, lb2_cuda_device* device) {
  int count = 0, major = 0, minor = 0, multiprocessors = 0, shared = 0;
  LB2_RETURN_IF_CUDA_ERROR("counting the GPUs", cudaGetDeviceCount(&count));
  if (ordinal < 0 || ordinal >= count)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "ordinal must be between 0 and %d, got %" PRId32, count - 1,
                ordinal);
  const char* what = "reading the GPU's properties";
  LB2_RETURN_IF_CUDA_ERROR(what, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal));
  LB2_RETURN_IF_CUDA_ERROR(what, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal));
  LB2_RETURN_IF_CUDA_ERROR(what,
                           cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ordinal));
  LB2_RETURN_IF_CUDA_ERROR(what,
                           cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal));
  device->struct_size = sizeof *device;
  device->capability = 10 * major + minor;
  device->multiprocessors = multiprocessors;
  device->shared_bytes = shared;
  return LB2_OK;
}

lb2_status current_device(int32_t* ordinal, lb2_cuda_device* device) {
  thread_local lb2_cuda_device known[kMaxDevices] = {};
  int current = 0;
  LB2_RETURN_IF_CUDA_ERROR("finding the current GPU", cudaGetDevice(&current));
  *ordinal = current;
  if (current >= kMaxDevices) return query_device(current, device);
  if (known[current].struct_size == 0) LB2_RETURN_IF_ERROR(query_device(current, &known[current]));
  *device = known[current];
  return LB2_OK;
}

// A plan may have been made on another machine, or before another GPU became the current one.
lb2_status check_same_device(const lb2_cuda_device& current, const lb2_cuda_device& planned) {
  if (current.capability == planned.capability && current.shared_bytes >= planned.shared_bytes) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "plan must be made for the current GPU (capability %" PRId32 ", %" PRId64
              " bytes of shared memory), got one for capability %" PRId32 ", %" PRId64 " bytes",
              current.capability, current.shared_bytes, planned.capability, planned.shared_bytes);
}

// Allows the kernel the shared memory that it may ever be planned with, once per thread and device.
lb2_status allow_shared_memory(DecodeKernel kernel, int32_t ordinal, const lb2_cuda_device& device,
                               lb2_activation activation, int32_t token_tile) {
  constexpr int kTileBits = 5;  // 1 .. 16
  thread_local uint8_t allowed[kMaxDevices][LB2_ACTIVATION_FLOAT16 + 1][1 << kTileBits] = {};
  uint8_t* known = ordinal < kMaxDevices ? &allowed[ordinal][activation][token_tile] : nullptr;
  if (known != nullptr && *known) return LB2_OK;
  LB2_RETURN_IF_CUDA_ERROR(
      "preparing a kernel",
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(device.shared_bytes)));
  if (known != nullptr) *known = 1;
  return LB2_OK;
}

lb2_status launch(const lb2_cuda_stage& stage, DecodeKernel kernel, const StageParams& params,
                  cudaStream_t stream) {
  cudaLaunchAttribute chained = {};
  chained.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  chained.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(stage.grid_x, stage.grid_y, stage.grid_z);
  config.blockDim = dim3(stage.threads);
  config.dynamicSmemBytes = stage.shared_bytes;
  config.stream = stream;
  config.attrs = &chained;
  config.numAttrs = stage.chained ? 1 : 0;
  LB2_RETURN_IF_CUDA_ERROR("launching a kernel", cudaLaunchKernelEx(&config, kernel, params));
  return LB2_OK;
}

}  // namespace
}  // namespace lb2::cuda

lb2_status lb2_cuda_get_device(int32_t ordinal, lb2_cuda_device* device) {
  if (device == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "device must not be NULL");
  if (device->struct_size != sizeof(lb2_cuda_device))
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT,
                     "device->struct_size must equal sizeof(lb2_cuda_device) = %zu, got %" PRIu64,
                     sizeof(lb2_cuda_device), device->struct_size);
  lb2_cuda_device found = {};
  LB2_RETURN_IF_ERROR(lb2::cuda::query_device(ordinal, &found));
  *device = found;
  return lb2::cuda::check_device(&found);
}

lb2_status lb2_linear_forward_cuda(const lb2_linear_args* args, const lb2_cuda_plan* made, void* stream) {
  using namespace lb2::cuda;
  LB2_RETURN_IF_ERROR(lb2::check_layer(args));
  Plan plan;
  LB2_RETURN_IF_ERROR(resume_plan(*args, made, &plan));
  int32_t ordinal;
  lb2_cuda_device device;
  LB2_RETURN_IF_ERROR(current_device(&ordinal, &device));
  LB2_RETURN_IF_ERROR(check_same_device(device, plan.device));
  LB2_RETURN_IF_ERROR(lb2::check_buffers(*args, lb2::Direction::kForward, plan.workspace_bytes));
  char* workspace = align_workspace(args->workspace);
  for (int64_t first = 0; first < args->m; first += plan.token_block) {
    const int64_t left = args->m - first, tokens = left < plan.token_block ? left : plan.token_block;
    for (int i = 0; i < plan.num_stages; ++i) {
      const lb2_cuda_stage stage = stage_launch(plan, i, tokens);
      DecodeKernel kernel = find_decode(plan.activation, stage.token_tile);
      LB2_RETURN_IF_ERROR(allow_shared_memory(kernel, ordinal, device, plan.activation, stage.token_tile));
      LB2_RETURN_IF_ERROR(launch(stage, kernel, stage_params(*args, plan, i, first, tokens, workspace),
                                 static_cast<cudaStream_t>(stream)));
    }
  }
  return LB2_OK;
}
