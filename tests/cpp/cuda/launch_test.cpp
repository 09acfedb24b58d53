// The entry points of liblittlebit2_cuda with a GPU of the test's own: what they ask of the CUDA runtime, and
// what they say of its errors.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cuda_host/cuda_runtime.h"
#include "littlebit2/cuda.h"

namespace {

using lb2::cuda::host::Runtime;
using lb2::cuda::host::runtime;

int failures = 0;

#define EXPECT(condition)                                                                                 \
  do {                                                                                                    \
    if (!(condition)) {                                                                                   \
      std::fprintf(stderr, "%s:%d: not so: %s [%s]\n", __FILE__, __LINE__, #condition, lb2_last_error()); \
      ++failures;                                                                                         \
    }                                                                                                     \
  } while (false)

bool says(lb2_status got, lb2_status status, const char* part) {
  return got == status && std::strstr(lb2_last_error(), part) != nullptr;
}

// A GPU that no call has seen yet.
void fresh_gpu(int capability) {
  static int ordinal = 0;
  Runtime gpu;
  gpu.capability = capability;
  gpu.ptx_version = capability;
  gpu.current = ++ordinal;
  gpu.devices = ordinal + 1;
  runtime() = gpu;
}

// All signs +1, all scales 1: every output is R K.
struct Call {
  static constexpr int64_t kK = 64, kN = 32, kRank = 8;
  std::vector<int32_t> words = std::vector<int32_t>(64, 0);
  std::vector<float> ones = std::vector<float>(64, 1.0f), x, y;
  std::vector<char> workspace;
  lb2_path path = {};
  lb2_linear_args args = {};
  lb2_cuda_plan plan = {};

  explicit Call(int64_t m) : x(static_cast<size_t>(m * kK), 1.0f), y(static_cast<size_t>(m * kN)) {
    path.v = path.u = words.data();
    path.v_stride = 2;
    path.u_stride = 1;
    path.rank = kRank;
    path.in_scale = path.latent_scale = path.out_scale = ones.data();
    args.struct_size = sizeof args;
    args.m = m;
    args.k = kK;
    args.n = kN;
    args.paths = &path;
    args.num_paths = 1;
    args.dtype = LB2_FLOAT32;
    args.input = x.data();
    args.input_stride = kK;
    args.output = y.data();
    args.output_stride = kN;
    plan.struct_size = sizeof plan;
    lb2_cuda_device device = {};
    device.struct_size = sizeof device;
    EXPECT(lb2_cuda_get_device(runtime().current, &device) == LB2_OK);
    lb2_layer_shape shape = {};
    shape.struct_size = sizeof shape;
    EXPECT(lb2_linear_shape(&args, &shape) == LB2_OK);
    EXPECT(lb2_linear_plan_cuda(&shape, m, args.dtype, LB2_ACTIVATION_AUTO, &device, nullptr, &plan) ==
           LB2_OK);
    workspace.resize(static_cast<size_t>(plan.workspace_bytes));
    args.workspace = workspace.data();
    args.workspace_bytes = plan.workspace_bytes;
  }

  lb2_status run(void* stream = nullptr) { return lb2_linear_forward_cuda(&args, &plan, stream); }
};

void test_results_launches_and_streams() {
  for (const int64_t m : {1, 5, 300}) {
    fresh_gpu(90);
    Call call(m);
    int stream = 0;
    EXPECT(call.run(&stream) == LB2_OK);
    for (const float value : call.y) EXPECT(value == Call::kK * Call::kRank);
    // One for both stages of many tokens, as the layer is small.
    EXPECT(runtime().launches.size() == (m > 16 ? 1u : m > 4 ? 4u : 2u));
    for (const Runtime::Launch& launch : runtime().launches)
      EXPECT(launch.stream == &stream && launch.chained);
    // Blocks of small calls ask for nothing, as that would drain an SM between a user's kernel and ours.
    EXPECT(runtime().largest_allowed() == (m > 16 ? 232448u : 0u));
    // What was found out about a kernel is kept.
    const size_t launches = runtime().launches.size();
    EXPECT(call.run(&stream) == LB2_OK && runtime().launches.size() == 2 * launches);
    for (const float value : call.y) EXPECT(value == Call::kK * Call::kRank);
  }
  // The decode kernels in rounds of 128 tokens, where the GEMM's have no room.
  fresh_gpu(90);
  runtime().shared_bytes = 64 * 1024;
  Call rounds(300);
  EXPECT(rounds.run() == LB2_OK && runtime().launches.size() == 12);
  for (const float value : rounds.y) EXPECT(value == Call::kK * Call::kRank);
  fresh_gpu(90);
  Call none(0);
  EXPECT(none.run() == LB2_OK && runtime().launches.empty());
}

void test_chained_only_where_kernels_wait() {
  fresh_gpu(86);
  Call old(1);
  EXPECT(old.run() == LB2_OK && !runtime().launches[0].chained && !runtime().launches[1].chained);
  // Compiled by the driver from PTX of an architecture whose kernels have no wait.
  fresh_gpu(90);
  runtime().ptx_version = 80;
  Call translated(1);
  EXPECT(translated.run() == LB2_OK && !runtime().launches[0].chained && !runtime().launches[1].chained);
  EXPECT(translated.y[0] == Call::kK * Call::kRank);
}

// What every launch asks of each architecture: to start early from sm_90 on, a cluster where it has one.
void test_launch_attributes_by_architecture() {
  for (const int capability : {80, 86, 89, 90, 100, 120})
    for (const int64_t m : {1, 8, 300}) {
      fresh_gpu(capability);
      Call call(m);
      EXPECT(call.run() == LB2_OK);
      EXPECT(!runtime().launches.empty());
      for (const Runtime::Launch& launch : runtime().launches) {
        EXPECT(launch.chained == (capability >= 90));
        EXPECT(launch.attributes == (capability >= 90) + (launch.cluster_blocks > 1));
        EXPECT(launch.cluster_blocks == 1 || (capability >= 90 && m == 300));
      }
    }
}

// The first call of a process may be captured into a graph: it only queues launches, which compute when the
// graph is replayed, with the activations of that time.
void test_first_use_inside_a_capture() {
  for (const int64_t m : {1, 8, 300}) {
    fresh_gpu(90);
    Call call(m);
    runtime().capturing = true;
    EXPECT(call.run() == LB2_OK);
    runtime().capturing = false;
    EXPECT(runtime().captured.size() == runtime().launches.size());
    for (const float value : call.y) EXPECT(value == 0.0f);
    // Arguments were read on the host: they may be gone.
    call.path = {};
    call.args = {};
    runtime().replay();
    for (const float value : call.y) EXPECT(value == Call::kK * Call::kRank);
    std::fill(call.x.begin(), call.x.end(), 2.0f);
    runtime().replay();
    for (const float value : call.y) EXPECT(value == 2 * Call::kK * Call::kRank);
  }
}

// What a kernel was allowed on one device does not hold on another, and what a thread has found out is its
// own.
void test_two_devices_and_fresh_threads() {
  fresh_gpu(90);
  Call call(300);
  EXPECT(call.run() == LB2_OK);
  const int first = runtime().current;
  runtime().current = first + 1;
  runtime().devices = first + 2;
  Call other(300);
  EXPECT(other.run() == LB2_OK && other.y[0] == Call::kK * Call::kRank);
  EXPECT(runtime().launches.back().device == first + 1);
  EXPECT(runtime().allowed.size() == 2);
  runtime().current = first;
  EXPECT(call.run() == LB2_OK && runtime().launches.back().device == first);
  lb2_status status = LB2_ERROR_INTERNAL;
  std::fill(call.y.begin(), call.y.end(), 0.0f);
  runtime().launches.clear();
  std::thread([&] { status = call.run(); }).join();
  EXPECT(status == LB2_OK && call.y[0] == Call::kK * Call::kRank);
  EXPECT(runtime().launches.size() == 1 && runtime().launches[0].chained);
  // The next test's GPU is one that nothing has seen.
  fresh_gpu(90);
}

// Whether clusters fit is asked once, whatever the answer is.
void test_clusters_are_counted_once() {
  for (const int most : {1000, 0}) {
    fresh_gpu(90);
    runtime().most_clusters = most;
    Call call(300);
    for (int i = 0; i < 3; ++i) {
      EXPECT(call.run() == LB2_OK && call.y[0] == Call::kK * Call::kRank);
      EXPECT((runtime().launches.back().cluster_blocks > 1) == (most > 0));
    }
    EXPECT(runtime().cluster_queries == 1);
  }
}

// LB2_CUDA_CHAINED=0, in a process of its own.
int run_unchained() {
  fresh_gpu(90);
  Call call(1);
  EXPECT(call.run() == LB2_OK && call.plan.launches[0].chained == 1);
  EXPECT(call.y[0] == Call::kK * Call::kRank);
  for (const Runtime::Launch& launch : runtime().launches) EXPECT(!launch.chained && launch.attributes == 0);
  return failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

void test_errors() {
  fresh_gpu(90);
  Call call(1);
  for (const cudaError_t error : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction,
                                  cudaErrorInvalidKernelImage, cudaErrorUnsupportedPtxVersion}) {
    runtime().error = error;
    EXPECT(says(call.run(), LB2_ERROR_UNSUPPORTED, "has no code for this GPU's architecture"));
    EXPECT(says(call.run(), LB2_ERROR_UNSUPPORTED, "rebuild with LB2_CUDA_ARCHS naming it"));
  }
  runtime().error = cudaErrorLaunchFailure;
  EXPECT(says(call.run(), LB2_ERROR_INTERNAL,
              "preparing a kernel: an error of the test's (cudaErrorLaunchFailure)"));
  runtime().error = cudaSuccess;
  EXPECT(call.run() == LB2_OK);
  runtime().error = cudaErrorLaunchFailure;
  EXPECT(says(call.run(), LB2_ERROR_INTERNAL, "launching a kernel"));
  runtime().error = cudaSuccess;

  lb2_linear_args args = call.args;
  args.workspace = nullptr;
  EXPECT(says(lb2_linear_forward_cuda(&args, &call.plan, nullptr), LB2_ERROR_INVALID_ARGUMENT, "workspace"));
  args = call.args;
  args.output = reinterpret_cast<char*>(call.y.data()) + 2;
  EXPECT(says(lb2_linear_forward_cuda(&args, &call.plan, nullptr), LB2_ERROR_INVALID_ARGUMENT,
              "output must be aligned to 4 bytes"));
  args = call.args;
  args.m = 2;
  EXPECT(says(lb2_linear_forward_cuda(&args, &call.plan, nullptr), LB2_ERROR_INVALID_ARGUMENT,
              "plan must be what was made for"));
  EXPECT(says(lb2_linear_forward_cuda(&call.args, nullptr, nullptr), LB2_ERROR_INVALID_ARGUMENT,
              "plan must not be NULL"));

  fresh_gpu(80);  // has become the current one
  EXPECT(says(
      call.run(), LB2_ERROR_INVALID_ARGUMENT,
      "plan must be made for the current GPU (capability 80, 232448 bytes of shared memory), got one for "
      "capability 90"));
}

void test_get_device() {
  fresh_gpu(90);
  lb2_cuda_device device = {};
  EXPECT(says(lb2_cuda_get_device(0, nullptr), LB2_ERROR_INVALID_ARGUMENT, "device must not be NULL"));
  EXPECT(says(lb2_cuda_get_device(0, &device), LB2_ERROR_INVALID_ARGUMENT, "struct_size"));
  device.struct_size = sizeof device;
  EXPECT(lb2_cuda_get_device(runtime().current, &device) == LB2_OK);
  EXPECT(device.capability == 90 && device.multiprocessors == 132 && device.shared_bytes == 232448);
  EXPECT(
      says(lb2_cuda_get_device(1000, &device), LB2_ERROR_INVALID_ARGUMENT, "ordinal must be between 0 and"));
  fresh_gpu(75);
  EXPECT(
      says(lb2_cuda_get_device(runtime().current, &device), LB2_ERROR_UNSUPPORTED, "8.0 or newer, got 7.5"));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "unchained") == 0) return run_unchained();
  test_results_launches_and_streams();
  test_chained_only_where_kernels_wait();
  test_launch_attributes_by_architecture();
  test_first_use_inside_a_capture();
  test_two_devices_and_fresh_threads();
  test_clusters_are_counted_once();
  test_errors();
  test_get_device();
  if (failures > 0) return EXIT_FAILURE;
  std::printf("passed\n");
  return EXIT_SUCCESS;
}
