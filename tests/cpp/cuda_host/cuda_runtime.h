// The part of the CUDA runtime that csrc/cuda/launch.cu uses, with a GPU that is described by the test:
// launches run at once on the host (run_grid.h).
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "cuda_host/run_grid.h"

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidDeviceFunction,
  cudaErrorInvalidKernelImage,
  cudaErrorLaunchFailure,
  cudaErrorNoKernelImageForDevice,
  cudaErrorUnsupportedPtxVersion,
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeNone,
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;

using cudaStream_t = void*;

struct cudaFuncAttributes {
  int ptxVersion;
};
struct dim3 {
  unsigned x, y, z;
  dim3(int32_t x_ = 1, int32_t y_ = 1, int32_t z_ = 1)
      : x(static_cast<unsigned>(x_)), y(static_cast<unsigned>(y_)), z(static_cast<unsigned>(z_)) {}
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace lb2::cuda::host {

// What the runtime is to find, and what was asked of it.
struct Runtime {
  int devices = 1, current = 0;
  int capability = 90, multiprocessors = 132, shared_bytes = 232448;
  int ptx_version = 90;             // of every kernel
  int most_clusters = 1000;         // that there is room for
  cudaError_t error = cudaSuccess;  // of whatever touches a kernel
  Order order = Order::kForward;
  struct Launch {
    cudaStream_t stream;
    bool chained;
    size_t shared_bytes;
    int cluster_blocks;
  };
  std::vector<Launch> launches;
  // What kernels write, and what they only read: threads that have not waited for the kernel before theirs
  // must not touch the former, and in the first of every `round` launches, which follows a foreign kernel,
  // neither.
  std::vector<Region> written, layer;
  size_t round = 1;
  size_t allowed_shared_bytes = 48 * 1024;  // the most that a kernel was allowed
};
Runtime& runtime();

}  // namespace lb2::cuda::host

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the test's"; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorOther";
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = lb2::cuda::host::runtime().devices;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = lb2::cuda::host::runtime().current;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const lb2::cuda::host::Runtime& gpu = lb2::cuda::host::runtime();
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? gpu.capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? gpu.capability % 10
           : attribute == cudaDevAttrMultiProcessorCount    ? gpu.multiprocessors
                                                            : gpu.shared_bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = lb2::cuda::host::runtime().ptx_version;
  return lb2::cuda::host::runtime().error;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    lb2::cuda::host::runtime().allowed_shared_bytes = static_cast<size_t>(value);
  return lb2::cuda::host::runtime().error;
}
// A GPU has room for a cluster where it has as many multiprocessors, unless the test says otherwise.
template <typename Params>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Params),
                                           const cudaLaunchConfig_t* config) {
  const lb2::cuda::host::Runtime& gpu = lb2::cuda::host::runtime();
  *clusters =
      std::min(gpu.most_clusters, gpu.multiprocessors / static_cast<int>(config->attrs->val.clusterDim.y));
  return gpu.error;
}
template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               std::remove_const_t<Params> params) {
  lb2::cuda::host::Runtime& gpu = lb2::cuda::host::runtime();
  if (gpu.error != cudaSuccess) return gpu.error;
  if (config->dynamicSmemBytes > gpu.allowed_shared_bytes) return cudaErrorLaunchFailure;
  bool chained = false;
  int cluster_blocks = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      chained = attribute.val.programmaticStreamSerializationAllowed == 1;
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    cluster_blocks = static_cast<int>(attribute.val.clusterDim.y);
    if (gpu.capability < 90 || gpu.ptx_version < 90 || attribute.val.clusterDim.x != 1 ||
        attribute.val.clusterDim.z != 1 || cluster_blocks > 8 || cluster_blocks > gpu.multiprocessors ||
        gpu.most_clusters == 0)
      return cudaErrorLaunchFailure;
  }
  std::vector<lb2::cuda::Region> guarded = gpu.written;
  if (gpu.launches.size() % gpu.round == 0) guarded.insert(guarded.end(), gpu.layer.begin(), gpu.layer.end());
  gpu.launches.push_back({config->stream, chained, config->dynamicSmemBytes, cluster_blocks});
  const lb2::cuda::Grid grid = {static_cast<int>(config->gridDim.x), static_cast<int>(config->gridDim.y),
                                static_cast<int>(config->gridDim.z)};
  lb2::cuda::run_grid(
      grid, static_cast<int>(config->blockDim.x), config->dynamicSmemBytes, [&] { kernel(params); },
      gpu.order, guarded, true, 1, cluster_blocks);
  return cudaSuccess;
}
