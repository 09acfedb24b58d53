// The part of the CUDA runtime that csrc/cuda/launch.cu uses, with a GPU that is described by the test:
// launches run at once on the host (run_grid.h).
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <map>
#include <type_traits>
#include <utility>
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
    unsigned attributes;
    int device;
    size_t params_bytes;  // which kernel it is, as far as it has parameters of its own
  };
  std::vector<Launch> launches;
  // What kernels write, and what they only read: threads that have not waited for the kernel before theirs
  // must not touch the former, and in the first of every `round` launches, which follows a foreign kernel,
  // neither.
  std::vector<Region> written, layer;
  size_t round = 1;
  // Dynamic shared memory that kernels of devices were allowed, and whether they asked for another split of
  // L1 and shared memory; both hold for one device.
  struct Allowed {
    size_t shared_bytes = 48 * 1024;
    bool carveout = false;
  };
  std::map<std::pair<int, const void*>, Allowed> allowed;
  size_t largest_allowed() const {
    size_t largest = 0;
    for (const auto& [kernel, own] : allowed) largest = std::max(largest, own.shared_bytes);
    return largest;
  }
  int cluster_queries = 0;
  // A stream that captures keeps launches, with their parameters as they were, for replay().
  bool capturing = false;
  std::vector<std::function<void()>> captured;
  void replay() const {
    for (const std::function<void()>& launch : captured) launch();
  }
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
inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  lb2::cuda::host::Runtime& gpu = lb2::cuda::host::runtime();
  lb2::cuda::host::Runtime::Allowed& allowed = gpu.allowed[{gpu.current, function}];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    allowed.shared_bytes = static_cast<size_t>(value);
  else
    allowed.carveout = true;
  return gpu.error;
}
// A GPU has room for a cluster where it has as many multiprocessors, unless the test says otherwise.
template <typename Params>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Params),
                                           const cudaLaunchConfig_t* config) {
  lb2::cuda::host::Runtime& gpu = lb2::cuda::host::runtime();
  ++gpu.cluster_queries;
  *clusters =
      std::min(gpu.most_clusters, gpu.multiprocessors / static_cast<int>(config->attrs->val.clusterDim.y));
  return gpu.error;
}
template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               std::remove_const_t<Params> params) {
  lb2::cuda::host::Runtime& gpu = lb2::cuda::host::runtime();
  if (gpu.error != cudaSuccess) return gpu.error;
  const auto allowed = gpu.allowed.find({gpu.current, reinterpret_cast<const void*>(kernel)});
  const size_t most = allowed == gpu.allowed.end() ? lb2::cuda::host::Runtime::Allowed{}.shared_bytes
                                                   : allowed->second.shared_bytes;
  if (config->dynamicSmemBytes > most) return cudaErrorLaunchFailure;
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
  gpu.launches.push_back({config->stream, chained, config->dynamicSmemBytes, cluster_blocks, config->numAttrs,
                          gpu.current, sizeof(params)});
  const lb2::cuda::Grid grid = {static_cast<int>(config->gridDim.x), static_cast<int>(config->gridDim.y),
                                static_cast<int>(config->gridDim.z)};
  const int threads = static_cast<int>(config->blockDim.x);
  const size_t shared_bytes = config->dynamicSmemBytes;
  const lb2::cuda::Order order = gpu.order;
  const auto launch = [=] {
    lb2::cuda::run_grid(
        grid, threads, shared_bytes, [&] { kernel(params); }, order, guarded, true, 1, cluster_blocks);
  };
  if (gpu.capturing)
    gpu.captured.push_back(launch);
  else
    launch();
  return cudaSuccess;
}
