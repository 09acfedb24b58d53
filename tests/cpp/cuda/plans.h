// Planning a layer that has no data, on GPUs by their properties.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/plan/plan.h"

inline int failures = 0;

inline void expect(bool condition, const char* what, int64_t a = 0, int64_t b = 0) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (%" PRId64 ", %" PRId64 ")\n", what, a, b);
  ++failures;
}

inline lb2_cuda_device gpu(int32_t capability, int32_t multiprocessors, int64_t shared_bytes) {
  return {sizeof(lb2_cuda_device), capability, multiprocessors, shared_bytes};
}

inline const lb2_cuda_device kGpus[] = {gpu(80, 108, 166912), gpu(86, 84, 101376),   gpu(89, 128, 101376),
                                        gpu(90, 132, 232448), gpu(100, 148, 232448), gpu(120, 170, 101376)};

// A layer to plan, and what is planned for. A rank of 0 stands for a path of a single-stage layer.
struct Layer {
  int64_t m;
  lb2_dtype dtype;
  lb2_layer_shape shape = {};
  Layer(int64_t tokens, int64_t k, int64_t n, const std::vector<int64_t>& ranks, lb2_dtype type)
      : m(tokens), dtype(type) {
    shape.struct_size = sizeof shape;
    shape.k = k;
    shape.n = n;
    shape.num_paths = static_cast<int64_t>(ranks.size());
    shape.single_stage = ranks[0] == 0;
    for (size_t p = 0; p < ranks.size(); ++p) {
      shape.ranks[p] = ranks[p] == 0 ? n : ranks[p];
      shape.shares[p] = static_cast<int32_t>(p);
    }
  }
};

inline lb2_status try_plan(const Layer& layer, lb2_activation activation, const lb2_cuda_device* device,
                           const lb2_cuda_tuning* tuning, lb2_cuda_plan* plan) {
  return lb2_linear_plan_cuda(&layer.shape, layer.m, layer.dtype, activation, device, tuning, plan);
}

inline lb2_cuda_plan plan_of(const Layer& layer, lb2_activation activation, const lb2_cuda_device& device) {
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  expect(try_plan(layer, activation, &device, nullptr, &plan) == LB2_OK, lb2_last_error());
  return plan;
}

// Whether a plan is taken for a call of the layer, and how it is resumed.
inline lb2_status resume(const Layer& layer, const lb2_cuda_plan* plan, lb2::cuda::Plan* resumed) {
  lb2::cuda::CallShape call;
  expect(lb2::cuda::gather_shapes(&layer.shape, 1, layer.m, layer.dtype, &call) == LB2_OK, lb2_last_error());
  return lb2::cuda::resume_plan(call, plan, resumed);
}

inline void expect_error(lb2_status got, lb2_status status, const char* part) {
  expect(got == status && std::strstr(lb2_last_error(), part) != nullptr, part, got);
}
