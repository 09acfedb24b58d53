// What the extended kernels compute around products of signs: factors of activations, RMS normalization,
// activation functions.
#pragma once

#include "cuda/staging.h"

namespace lb2::cuda {

constexpr lb2_function kNoFunction = -1;

LB2_DEVICE float apply_function(lb2_function function, float x) {
  switch (function) {
    case LB2_FUNCTION_SILU:
      return fast_divide(x, 1.0f + exponential(-x));
    case LB2_FUNCTION_GELU:
      return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    case LB2_FUNCTION_GELU_TANH:
      return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
    case LB2_FUNCTION_RELU:
      return x < 0.0f ? 0.0f : x;  // a NaN stays one
    default:
      return x;
  }
}

LB2_DEVICE float load_element(const void* data, int64_t index, lb2_dtype dtype) {
  if (dtype == LB2_FLOAT32) return static_cast<const float*>(data)[index];
  return half_value(static_cast<const uint16_t*>(data)[index], dtype);
}

LB2_DEVICE void store_element(void* output, int64_t index, lb2_dtype dtype, float value) {
  if (dtype == LB2_FLOAT32)
    static_cast<float*>(output)[index] = value;
  else
    static_cast<uint16_t*>(output)[index] =
        dtype == LB2_FLOAT16 ? float_to_half(value) : float_to_bfloat(value);
}

// A row of elements without scales and parts.
LB2_DEVICE SliceSource plain_row(const void* data, int64_t first, int cols, lb2_dtype dtype) {
  const int element_bytes = dtype == LB2_FLOAT32 ? 4 : 2;
  return {static_cast<const char*>(data) + first * element_bytes, nullptr, 0, 1, cols, dtype};
}

// The sum of squares of a row is taken in kWarps parts, each by one warp, wherever the row is read: part p
// has every kWarps-th slice from slice p on. All lanes get the sum.
LB2_DEVICE float part_of_squares(const SliceSource& row, int part, int lane) {
  float sum = 0.0f;
#pragma unroll 1
  for (int first = part * kSliceCols + lane; first < row.cols; first += kWarps * kSliceCols) {
    float values[kLaneCols];
#pragma unroll
    for (int i = 0; i < kLaneCols; ++i) {
      const int col = first + i * kWarpLanes;
      values[i] = col < row.cols ? load_element(row.row, col, row.dtype) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLaneCols; ++i) sum = fused_multiply_add(values[i], values[i], sum);
  }
  return warp_sum(sum);
}

LB2_DEVICE float norm_of(float squares, int cols, float eps) {
  return reciprocal_root(fast_divide(squares, static_cast<float>(cols)) + eps);
}

// By one warp.
LB2_DEVICE float norm_of_row(const SliceSource& row, float eps, int lane) {
  float squares = 0.0f;
#pragma unroll 1
  for (int part = 0; part < kWarps; ++part) squares += part_of_squares(row, part, lane);
  return norm_of(squares, row.cols, eps);
}

// values[i] *= factor + offset, of the runs at cols.
LB2_DEVICE void multiply_runs(const Extras& extras, int token, int width, const int (&cols)[2],
                              float (&values)[kLaneCols]) {
  float factors[kLaneCols];
  load_runs<false>(plain_row(extras.factor, token * extras.factor_stride, width, extras.factor_dtype), cols,
                   factors);
#pragma unroll
  for (int i = 0; i < kLaneCols; ++i) values[i] *= factors[i] + extras.factor_offset;
}

}  // namespace lb2::cuda
