// Dequantizes signs and scales to dense matrices, for matrix products of a library with many tokens.
#pragma once

#include "cuda/device.h"
#include "cuda/params.h"

namespace lb2::cuda {

constexpr int kUnpackCols = 8;  // columns per thread: 16 bytes of half precision
constexpr int kUnpackRows = 4;

// row_scale[rows] * signs[rows, cols] * col_scale[cols]
struct Factor {
  const uint32_t* words;
  const float* row_scale;  // or NULL for 1
  const float* col_scale;
  int64_t word_stride;
};

// The sum of its factors, rounded once.
struct Unpacked {
  void* output;
  int64_t stride;  // elements between its rows
  int64_t first_block;
  int32_t rows, cols;
  int32_t first_factor, last_factor;
};

struct UnpackParams {
  Factor factors[2 * LB2_MAX_PATHS];
  Unpacked matrices[2 * LB2_MAX_PATHS];
  int32_t num_factors, num_matrices;
  lb2_dtype dtype;
};

LB2_DEVICE uint16_t to_half_precision(float value, lb2_dtype dtype) {
  return dtype == LB2_FLOAT16 ? float_to_half(value) : float_to_bfloat(value);
}

// The first `count` of the values to a row, 16 bytes at a time where they lie at a multiple of it.
LB2_DEVICE void store_unpacked(void* output, lb2_dtype dtype, int64_t at, int count,
                               const float (&values)[kUnpackCols]) {
  if (dtype == LB2_FLOAT32) {
    float* target = static_cast<float*>(output) + at;
    if (count == kUnpackCols && (reinterpret_cast<uintptr_t>(target) & 15) == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Words4 words;
#pragma unroll
        for (int i = 0; i < 4; ++i) words.w[i] = float_bits(values[4 * half + i]);
        reinterpret_cast<Words4*>(target)[half] = words;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kUnpackCols; ++i)
      if (i < count) target[i] = values[i];
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(output) + at;
  if (count == kUnpackCols && (reinterpret_cast<uintptr_t>(target) & 15) == 0) {
    Words4 words;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words.w[i] = to_half_precision(values[2 * i], dtype) |
                   static_cast<uint32_t>(to_half_precision(values[2 * i + 1], dtype)) << 16;
    *reinterpret_cast<Words4*>(target) = words;
    return;
  }
#pragma unroll
  for (int i = 0; i < kUnpackCols; ++i)
    if (i < count) target[i] = to_half_precision(values[i], dtype);
}

// A thread has 8 columns of 4 rows; threads are numbered along the columns of a matrix, then down its rows.
LB2_KERNEL(kThreads, 4)
unpack(const LB2_GRID_CONSTANT UnpackParams params) {
  wait_for_previous_kernel();
  int index = 0;
  while (index + 1 < params.num_matrices && params.matrices[index + 1].first_block <= block_x()) ++index;
  const Unpacked& matrix = params.matrices[index];
  const int64_t item = (block_x() - matrix.first_block) * kThreads + thread_id();
  const int64_t runs = (matrix.cols + kUnpackCols - 1) / kUnpackCols;
  const int64_t first_row = item / runs * kUnpackRows;
  const int col = static_cast<int>(item % runs) * kUnpackCols;
  if (first_row >= matrix.rows) return;
  const int count = matrix.cols - col < kUnpackCols ? matrix.cols - col : kUnpackCols;
  float sums[kUnpackRows][kUnpackCols] = {};
  for (int i = matrix.first_factor; i < matrix.last_factor; ++i) {
    const Factor& factor = params.factors[i];
    float col_scale[kUnpackCols];
#pragma unroll
    for (int j = 0; j < kUnpackCols; ++j) col_scale[j] = j < count ? factor.col_scale[col + j] : 0.0f;
#pragma unroll
    for (int r = 0; r < kUnpackRows; ++r) {
      const int64_t row = first_row + r;
      if (row >= matrix.rows) continue;
      const uint32_t bits =
          factor.words[row * factor.word_stride + col / LB2_WORD_BITS] >> col % LB2_WORD_BITS;
      const float row_scale = factor.row_scale == nullptr ? 1.0f : factor.row_scale[row];
#pragma unroll
      for (int j = 0; j < kUnpackCols; ++j) {
        const float product = multiply_rounded(row_scale, col_scale[j]);
        sums[r][j] += bits_float(float_bits(product) ^ (bits >> j & 1u) << 31);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kUnpackRows; ++r)
    if (first_row + r < matrix.rows)
      store_unpacked(matrix.output, params.dtype, (first_row + r) * matrix.stride + col, count, sums[r]);
}

}  // namespace lb2::cuda
