// What a launch in a graph costs by itself: kernels that do nothing, one after another, with and without
// programmatic dependent launch. Every time that is measured of small layers contains these.
#include "cuda/device.h"
#include "cuda/timing.h"

namespace {

constexpr int kLaunches = 256;
constexpr int kThreads = 256;

// As every chained kernel here does: wait for the kernel before, then let the next one start.
__global__ void wait_first() {
  lb2::cuda::wait_for_previous_kernel();
  lb2::cuda::let_next_kernel_start();
}

// The most overlap that there can be.
__global__ void start_next_first() {
  lb2::cuda::let_next_kernel_start();
  lb2::cuda::wait_for_previous_kernel();
}

double measure(void (*kernel)(), int blocks, bool chained) {
  lb2::bench::Graph graph([&](cudaStream_t stream) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = chained ? 1 : 0;
    for (int i = 0; i < kLaunches; ++i) LB2_CUDA(cudaLaunchKernelEx(&config, kernel));
  });
  return graph.median_seconds(21) / kLaunches * 1e6;
}

}  // namespace

int main(int argc, char** argv) {  // [FILE]: JSON
  FILE* json = lb2::bench::open_json(argc, argv);
  const int sms = lb2::bench::attribute(cudaDevAttrMultiProcessorCount);
  const bool chains = lb2::bench::attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  const char* separator = "";
  std::fprintf(json, "{\n  \"launches\": %d,\n  \"boundaries\": [", kLaunches);
  for (const int blocks : {1, sms, 2 * sms}) {
    const auto report = [&](const char* name, double microseconds) {
      std::printf("%4d blocks, %-28s %6.3f us\n", blocks, name, microseconds);
      std::fprintf(json, "%s\n    {\"blocks\": %d, \"launch\": \"%s\", \"us\": %.4f}", separator, blocks,
                   name, microseconds);
      separator = ",";
    };
    report("one after another", measure(wait_first, blocks, false));
    if (!chains) continue;
    report("chained, waits first", measure(wait_first, blocks, true));
    report("chained, starts next first", measure(start_next_first, blocks, true));
  }
  std::fprintf(json, "\n  ]\n}\n");
  return std::fclose(json) == 0 ? 0 : 2;
}
