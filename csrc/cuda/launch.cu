// The CUDA entry points of the C ABI: arguments checked, plan made, kernels queued. Nothing here waits.
#include <cinttypes>

#include "core/status.h"
#include "cuda/decode/kernels.h"
#include "cuda/environment.h"
#include "cuda/failure.h"
#include "cuda/fused/kernels.h"
#include "cuda/gemm/kernels.h"
#include "cuda/launch.h"
#include "cuda/plan/check.h"
#include "cuda/plan/fused.h"
#include "cuda/plan/gemm.h"
#include "cuda/plan/layers.h"
#include "cuda/plan/plan.h"
#include "cuda/pointwise/launch.h"

namespace lb2::cuda {

lb2_status cuda_failure(const char* what, cudaError_t error) noexcept {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorUnsupportedPtxVersion:
      return fail(
          LB2_ERROR_UNSUPPORTED,
          "%s: this build of liblittlebit2_cuda has no code for this GPU's architecture, and none that "
          "the driver could compile for it (%s); rebuild with LB2_CUDA_ARCHS naming it",
          what, cudaGetErrorName(error));
    default:
      return fail(LB2_ERROR_INTERNAL, "%s: %s (%s)", what, cudaGetErrorString(error),
                  cudaGetErrorName(error));
  }
}

namespace {

// Properties of a device do not change: they are queried once.
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

// A plan may have been made on another machine, or for a GPU that is not the current one.
lb2_status check_same_device(const lb2_cuda_device& current, const lb2_cuda_device& planned) {
  if (current.capability == planned.capability && current.shared_bytes >= planned.shared_bytes) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "plan must be made for the current GPU (capability %" PRId32 ", %" PRId64
              " bytes of shared memory), got one for capability %" PRId32 ", %" PRId64 " bytes",
              current.capability, current.shared_bytes, planned.capability, planned.shared_bytes);
}

// Properties of a kernel, queried once per thread and device.
struct KernelState {
  bool ready;
  bool waits;  // its code waits for the previous kernel itself, so it may start early
  bool large;  // allowed all the shared memory that a plan may use
};

// Shared memory of a block that every kernel may use without being allowed it.
constexpr int32_t kSmallShared = 48 * 1024;

// Allows a kernel all shared memory, and asks for the split of L1 and shared memory with most of the latter,
// so that two blocks fit on an SM. An SM drains before it changes the split: kernels of small blocks, which
// follow anyone's, leave it as it is.
lb2_status allow_shared(const void* function, const lb2_cuda_device& device) {
  const char* what = "preparing a kernel";
  LB2_RETURN_IF_CUDA_ERROR(what, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                      static_cast<int>(device.shared_bytes)));
  LB2_RETURN_IF_CUDA_ERROR(what,
                           cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                cudaSharedmemCarveoutMaxShared));
  return LB2_OK;
}

// The state of a kernel, `kept` for its thread and device, or NULL for a device that is not kept.
lb2_status kernel_state(const void* function, const lb2_cuda_launch& launch, const lb2_cuda_device& device,
                        KernelState* kept, KernelState* state) {
  KernelState unknown = {};
  KernelState& known = kept != nullptr ? *kept : unknown;
  if (!known.ready) {
    cudaFuncAttributes attributes;
    LB2_RETURN_IF_CUDA_ERROR("preparing a kernel", cudaFuncGetAttributes(&attributes, function));
    // The driver may have compiled older PTX for this GPU.
    known = {true, attributes.ptxVersion >= kLeastChained, false};
  }
  if (launch.shared_bytes > kSmallShared && !known.large) {
    LB2_RETURN_IF_ERROR(allow_shared(function, device));
    known.large = true;
  }
  *state = known;
  return LB2_OK;
}

// Whether a launch has any of the extras: if not, the kernel without them is faster.
bool is_extended(const lb2_cuda_launch& launch, const Extras& extras) {
  if (launch.kind == LB2_CUDA_CONVERT) return extras.factor != nullptr;
  return (extras.factor != nullptr && !converts_ahead(launch.token_tile)) || extras.normed ||
         extras.function_rows > 0 || extras.residual != nullptr;
}

lb2_status find_kernel(const lb2_cuda_launch& launch, int32_t ordinal, const lb2_cuda_device& device,
                       lb2_activation activation, bool extended, Kernel* kernel, KernelState* state) {
  thread_local KernelState known[kMaxDevices][4][LB2_ACTIVATION_FLOAT16 + 1][kMaxTokenTile + 1] = {};
  const bool converts = launch.kind == LB2_CUDA_CONVERT;
  const Kernels kernels = find_kernels(activation, launch.token_tile);
  *kernel = extended ? (converts ? kernels.convert_extended : kernels.decode_extended)
                     : (converts ? kernels.convert : kernels.decode);
  const int kind = 2 * extended + converts;
  KernelState* kept = ordinal < kMaxDevices ? &known[ordinal][kind][activation][launch.token_tile] : nullptr;
  return kernel_state(reinterpret_cast<const void*>(*kernel), launch, device, kept, state);
}

lb2_status find_plain_kernel(const lb2_cuda_launch& launch, int32_t ordinal, const lb2_cuda_device& device,
                             lb2_activation activation, lb2_dtype input_dtype, PlainKernel* kernel,
                             KernelState* state) {
  thread_local KernelState known[kMaxDevices][2][LB2_ACTIVATION_FLOAT16 + 1][kMaxTokenTile + 1] = {};
  const bool halves = input_dtype != LB2_FLOAT32;
  *kernel = find_kernels(activation, launch.token_tile).plain[halves];
  KernelState* kept =
      ordinal < kMaxDevices ? &known[ordinal][halves][activation][launch.token_tile] : nullptr;
  return kernel_state(reinterpret_cast<const void*>(*kernel), launch, device, kept, state);
}

lb2_status find_gemm_kernel(const lb2_cuda_launch& launch, int32_t ordinal, const lb2_cuda_device& device,
                            lb2_activation activation, GemmKernel* kernel, KernelState* state) {
  constexpr int kTiles = sizeof kGemmTiles / sizeof *kGemmTiles;
  thread_local KernelState known[kMaxDevices][LB2_ACTIVATION_FLOAT16 + 1][kTiles + 1] = {};
  *kernel = gemm_kernel_of(activation, launch.row_tile, launch.token_tile);
  int tile = 0;
  while (tile < kTiles &&
         (kGemmTiles[tile].rows != launch.row_tile || kGemmTiles[tile].tokens != launch.token_tile))
    ++tile;
  KernelState* kept = ordinal < kMaxDevices ? &known[ordinal][activation][tile] : nullptr;
  return kernel_state(reinterpret_cast<const void*>(*kernel), launch, device, kept, state);
}

lb2_status find_fused_kernel(const lb2_cuda_launch& launch, int32_t ordinal, const lb2_cuda_device& device,
                             lb2_activation activation, FusedKernel* kernel, KernelState* state) {
  thread_local KernelState known[kMaxDevices][LB2_ACTIVATION_FLOAT16 + 1] = {};
  *kernel = fused_kernel_of(activation);
  KernelState* kept = ordinal < kMaxDevices ? &known[ordinal][activation] : nullptr;
  return kernel_state(reinterpret_cast<const void*>(*kernel), launch, device, kept, state);
}

cudaLaunchAttribute cluster_of(int32_t blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = attribute.val.clusterDim.z = 1;
  attribute.val.clusterDim.y = static_cast<unsigned>(blocks);
  return attribute;
}

// Replaces the launch by one without clusters, which gives the same bits and takes no more shared memory, if
// the kernel has no clusters (compiled from older PTX), or if the GPU, or the part of it that this process
// may use, has no room for a cluster.
lb2_status fit_cluster(int32_t ordinal, FusedKernel kernel, const KernelState& state,
                       lb2_activation activation, lb2_cuda_launch* launch) {
  if (launch->grid_y == 1) return LB2_OK;
  // Shared memory per mode and cluster size: the most that is known to fit, and the least that is known not
  // to (0: none yet).
  struct Known {
    int32_t fits, exceeds;
  };
  thread_local Known known[kMaxDevices][LB2_ACTIVATION_FLOAT16 + 1][kFusedMostBlocks + 1] = {};
  Known unknown = {};
  Known& kept = ordinal < kMaxDevices ? known[ordinal][activation][launch->grid_y] : unknown;
  if (state.waits && launch->shared_bytes <= kept.fits) return LB2_OK;
  if (kept.exceeds != 0 && launch->shared_bytes >= kept.exceeds) {
    launch->grid_y = 1;
    return LB2_OK;
  }
  int clusters = 0;
  if (state.waits) {
    cudaLaunchAttribute attribute = cluster_of(launch->grid_y);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1, launch->grid_y, 1);
    config.blockDim = dim3(launch->threads);
    config.dynamicSmemBytes = launch->shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    LB2_RETURN_IF_CUDA_ERROR("counting clusters", cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  }
  if (clusters > 0) {
    kept.fits = launch->shared_bytes;
    return LB2_OK;
  }
  kept.exceeds = launch->shared_bytes;
  launch->grid_y = 1;
  return LB2_OK;
}

template <typename Params>
lb2_status queue(const lb2_cuda_launch& launch, void (*kernel)(const Params), bool chained,
                 const Params& params, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (chained && may_chain()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (launch.kind == LB2_CUDA_FUSED && launch.grid_y > 1) attributes[count++] = cluster_of(launch.grid_y);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.grid_x, launch.grid_y, launch.grid_z);
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  LB2_RETURN_IF_CUDA_ERROR("launching a kernel", cudaLaunchKernelEx(&config, kernel, params));
  return LB2_OK;
}

// The launches of the layers, without extras in all but the decode kernels.
lb2_status queue_layers(const Layers& layers, const Plan& plan, char* workspace, int32_t ordinal,
                        const lb2_cuda_device& device, cudaStream_t stream) {
  const int64_t m = layers.shape.m;
  for (int64_t first = 0; first < m; first += plan.token_block) {
    const int64_t left = m - first, tokens = left < plan.token_block ? left : plan.token_block;
    bool queued = false;  // a launch of this round
    for (int i = 0; i < plan.num_launches; ++i) {
      lb2_cuda_launch launch = launch_for(plan, i, tokens);
      KernelState state;
      if (is_fused(plan)) {
        FusedKernel both;
        LB2_RETURN_IF_ERROR(find_fused_kernel(launch, ordinal, device, plan.activation, &both, &state));
        LB2_RETURN_IF_ERROR(fit_cluster(ordinal, both, state, plan.activation, &launch));
        LB2_RETURN_IF_ERROR(queue(launch, both, launch.chained && state.waits,
                                  fused_params(layers, plan, launch.grid_y, first, tokens), stream));
        continue;
      }
      if (is_gemm(plan)) {
        GemmKernel multiply;
        LB2_RETURN_IF_ERROR(find_gemm_kernel(launch, ordinal, device, plan.activation, &multiply, &state));
        LB2_RETURN_IF_ERROR(queue(launch, multiply, launch.chained && state.waits,
                                  gemm_params(layers, plan, i, first, tokens, workspace), stream));
        continue;
      }
      DecodeLaunch decode;
      if (!next_decode_launch(layers, plan, i, first, tokens, queued, workspace, &decode)) continue;
      queued = true;
      if (decode.is_plain) {
        PlainKernel kernel;
        LB2_RETURN_IF_ERROR(find_plain_kernel(launch, ordinal, device, plan.activation,
                                              decode.plain.input_dtype, &kernel, &state));
        LB2_RETURN_IF_ERROR(queue(launch, kernel, launch.chained && state.waits, decode.plain, stream));
        continue;
      }
      Kernel kernel;
      LB2_RETURN_IF_ERROR(find_kernel(launch, ordinal, device, plan.activation,
                                      is_extended(launch, decode.params.extras), &kernel, &state));
      LB2_RETURN_IF_ERROR(queue(launch, kernel, launch.chained && state.waits, decode.params, stream));
    }
  }
  return LB2_OK;
}

}  // namespace

lb2_status queue_call(const Layers& layers, const Plan& plan, char* workspace, cudaStream_t stream) noexcept {
  int32_t ordinal = 0;
  lb2_cuda_device device;
  LB2_RETURN_IF_ERROR(current_device(&ordinal, &device));
  LB2_RETURN_IF_ERROR(check_same_device(device, plan.device));
  const CallExtras& extras = layers.extras;
  const CallShape& call = layers.shape;
  if (call.m == 0) return LB2_OK;
  if (is_decode(plan)) return queue_layers(layers, plan, workspace, ordinal, device, stream);
  // The factor and the function are those of an MLP, which sees to them between its calls.
  Layers normed = layers;
  if (extras.norm != nullptr) {
    float* output = reinterpret_cast<float*>(workspace + plan.normed_offset);
    LB2_RETURN_IF_ERROR(queue_normalize(*extras.norm, layers.input, layers.input_stride, call.dtype, call.m,
                                        call.k, output, stream));
    normed.input = output;
    normed.input_stride = call.k;
    normed.input_dtype = LB2_FLOAT32;
  }
  LB2_RETURN_IF_ERROR(queue_layers(normed, plan, workspace, ordinal, device, stream));
  if (extras.residual == nullptr) return LB2_OK;
  const lb2_linear_args& args = layers.front();
  Pointwise sum = {args.output, args.output_stride};
  sum.addend = extras.residual;
  sum.addend_stride = extras.residual_stride;
  return queue_pointwise(sum, call.m, args.n, args.dtype, stream);
}

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

lb2_status lb2_projections_forward_cuda(const lb2_linear_args* args, int64_t num_layers,
                                        const lb2_cuda_extras* extras, const lb2_cuda_plan* made,
                                        void* stream) {
  using namespace lb2::cuda;
  Layers layers;
  LB2_RETURN_IF_ERROR(gather_layers(args, num_layers, &layers));
  if (extras != nullptr) LB2_RETURN_IF_ERROR(add_extras(*extras, &layers));
  Plan plan;
  LB2_RETURN_IF_ERROR(resume_plan(layers.shape, made, &plan));
  LB2_RETURN_IF_ERROR(check_data(layers, plan.workspace_bytes));
  return queue_call(layers, plan, align_workspace(layers.front().workspace),
                    static_cast<cudaStream_t>(stream));
}

lb2_status lb2_grouped_forward_cuda(const lb2_linear_args* args, int64_t num_layers,
                                    const lb2_cuda_plan* plan, void* stream) {
  return lb2_projections_forward_cuda(args, num_layers, nullptr, plan, stream);
}

lb2_status lb2_linear_forward_cuda(const lb2_linear_args* args, const lb2_cuda_plan* plan, void* stream) {
  return lb2_grouped_forward_cuda(args, 1, plan, stream);
}
