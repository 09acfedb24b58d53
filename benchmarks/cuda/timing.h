// What the CUDA measurements share: errors that end the program, and graphs of calls timed in turns.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define LB2_CUDA(call)                                                                                \
  do {                                                                                                \
    const cudaError_t lb2_error_ = (call);                                                            \
    if (lb2_error_ != cudaSuccess) {                                                                  \
      std::fprintf(stderr, "error: %s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(lb2_error_)); \
      std::exit(2);                                                                                   \
    }                                                                                                 \
  } while (false)

namespace lb2::bench {

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  LB2_CUDA(cudaGetDevice(&device));
  LB2_CUDA(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// A captured sequence of calls.
class Graph {
 public:
  explicit Graph(const std::function<void(cudaStream_t)>& queue) {
    LB2_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    LB2_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    queue(stream_);
    cudaGraph_t graph = nullptr;
    LB2_CUDA(cudaStreamEndCapture(stream_, &graph));
    LB2_CUDA(cudaGraphInstantiate(&run_, graph, 0));
    LB2_CUDA(cudaGraphDestroy(graph));
    LB2_CUDA(cudaEventCreate(&start_));
    LB2_CUDA(cudaEventCreate(&end_));
  }
  ~Graph() {
    cudaEventDestroy(end_);
    cudaEventDestroy(start_);
    cudaGraphExecDestroy(run_);
    cudaStreamDestroy(stream_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Seconds of one replay, after another that is not timed.
  double seconds() {
    float milliseconds = 0.0f;
    LB2_CUDA(cudaGraphLaunch(run_, stream_));
    LB2_CUDA(cudaEventRecord(start_, stream_));
    LB2_CUDA(cudaGraphLaunch(run_, stream_));
    LB2_CUDA(cudaEventRecord(end_, stream_));
    LB2_CUDA(cudaStreamSynchronize(stream_));
    LB2_CUDA(cudaEventElapsedTime(&milliseconds, start_, end_));
    return milliseconds / 1e3;
  }

  // The median of some replays.
  double median_seconds(int replays) {
    std::vector<double> all;
    for (int i = 0; i < replays; ++i) all.push_back(seconds());
    return median(all);
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t run_ = nullptr;
  cudaEvent_t start_ = nullptr, end_ = nullptr;
};

// The file that a program's one argument names, for JSON; nowhere without an argument.
inline FILE* open_json(int argc, char** argv) {
  FILE* json = std::fopen(argc > 1 ? argv[1] : "/dev/null", "w");
  if (json == nullptr) {
    std::fprintf(stderr, "error: %s cannot be written\n", argv[1]);
    std::exit(2);
  }
  return json;
}

}  // namespace lb2::bench
