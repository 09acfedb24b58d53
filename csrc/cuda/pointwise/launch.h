// Queues the kernels of pointwise.h. They are not chained: the launch before them has ended when they start.
#pragma once

#include "cuda/failure.h"
#include "littlebit2/littlebit2.h"

namespace lb2::cuda {

lb2_status queue_normalize(const lb2_norm& norm, const void* input, int64_t input_stride, lb2_dtype dtype,
                           int64_t m, int64_t cols, float* output, cudaStream_t stream) noexcept;

// data = function(data) * factor + addend, all [m, cols].
struct Pointwise {
  void* data;
  int64_t stride;
  lb2_function function = -1;  // none
  const void* factor = nullptr;
  int64_t factor_stride = 0;
  const void* addend = nullptr;
  int64_t addend_stride = 0;
};
lb2_status queue_pointwise(const Pointwise& call, int64_t m, int64_t cols, lb2_dtype dtype,
                           cudaStream_t stream) noexcept;

}  // namespace lb2::cuda
