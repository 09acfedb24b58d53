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

// A layer without data: planning looks at sizes and at which pointers are equal.
struct Layer {
  int32_t word = 0;
  float scale = 0.0f;
  std::vector<lb2_path> paths;
  lb2_linear_args args = {};
  Layer(int64_t m, int64_t k, int64_t n, const std::vector<int64_t>& ranks, lb2_dtype dtype) {
    for (const int64_t rank : ranks) {
      lb2_path path = {};
      path.rank = rank == 0 ? n : rank;
      path.v = &word + paths.size();
      path.v_stride = lb2_words_per_row(k);
      path.in_scale = path.out_scale = &scale;
      if (rank != 0) {
        path.u = &word;
        path.u_stride = lb2_words_per_row(rank);
        path.latent_scale = &scale;
      }
      paths.push_back(path);
    }
    args.struct_size = sizeof args;
    args.m = m;
    args.k = k;
    args.n = n;
    args.paths = paths.data();
    args.num_paths = static_cast<int64_t>(paths.size());
    args.dtype = dtype;
  }
};

inline lb2_cuda_plan plan_of(const Layer& layer, lb2_activation activation, const lb2_cuda_device& device) {
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  expect(lb2_linear_plan_cuda(&layer.args, activation, &device, nullptr, &plan) == LB2_OK, lb2_last_error());
  return plan;
}

// Whether a plan is taken for a call of the layer, and how it is resumed.
inline lb2_status resume(const Layer& layer, const lb2_cuda_plan* plan, lb2::cuda::Plan* resumed,
                         lb2::cuda::Layers* layers) {
  expect(lb2::cuda::gather_layers(&layer.args, 1, layers) == LB2_OK, lb2_last_error());
  return lb2::cuda::resume_plan(*layers, plan, resumed);
}

inline void expect_error(lb2_status got, lb2_status status, const char* part) {
  expect(got == status && std::strstr(lb2_last_error(), part) != nullptr, part, got);
}
