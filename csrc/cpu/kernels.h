// The table of primitives that one instruction set provides, and how the driver sees it.
//
// Arithmetic contract, which makes results bit-identical across instruction sets and independent of tiling,
// thread count and batch: columns are split into chunks of kDotChunk; within a chunk, lane l (of 16) adds the
// products of columns l, l + 16, l + 32, ... in order; the 16 lanes are then added as a tree (i with i + 8,
// then i + 4, i + 2, i + 1); chunk results are added in order. A product with +-1 is exact, so a fused
// multiply-add and an add round alike. All of it in fp32.
#pragma once

#include <cstdint>

#include "littlebit2/littlebit2.h"

namespace lb2::cpu {

constexpr int kLanes = 16;           // columns that one accumulator vector holds
constexpr int kTileRows = 16;        // rows of a sign_dots tile
constexpr int kTileCols = 64;        // columns of a sign_sums tile
constexpr int64_t kDotChunk = 1024;  // columns summed in one accumulator: bounds error growth, fits x in L1
constexpr int64_t kSumChunk = 256;   // likewise, rows of sign_sums

// Packed sign rows; padded columns of the operand are zero, so whole words can be used.
struct SignRows {
  const int32_t* words;  // first row; any byte alignment
  int64_t stride;        // words between rows
  int64_t rows;
  int64_t words_per_row;
};

// Rows of a dense int8 matrix.
struct Int8Rows {
  const int8_t* values;  // first row; any address
  int64_t stride;        // bytes between rows
  int64_t rows;
  int64_t cols;
};

struct Kernels {
  // out[i] = float(in[i]) * scale[i] for i < n, and 0 for n <= i < padded (a multiple of kLanes).
  void (*load_scaled)(lb2_dtype dtype, const void* in, const float* scale, int64_t n, int64_t padded,
                      float* out);

  // out[t * kTileRows + r] = sum_c sign(rows[r][c]) * x[t * x_stride + c], r < rows.rows <= kTileRows.
  // x holds words_per_row * 32 columns per token. Entries for r >= rows.rows are unspecified.
  void (*sign_dots)(const SignRows& rows, const float* x, int64_t x_stride, int64_t tokens, float* out);

  // out[t * kTileCols + c] = sum_r sign(rows[r][c]) * x[t * x_stride + r] for the first kTileCols columns of
  // rows.words; entries past words_per_row * 32 are unspecified.
  void (*sign_sums)(const SignRows& rows, const float* x, int64_t x_stride, int64_t tokens, float* out);

  // out[i] = dtype(in[i]), rounded to nearest even.
  void (*store)(lb2_dtype dtype, const float* in, int64_t n, void* out);

  // out[i] = float(in[i]) for i < n, and 0 for n <= i < padded (a multiple of kLanes).
  void (*load_padded)(lb2_dtype dtype, const void* in, int64_t n, int64_t padded, float* out);

  // out[t * kTileRows + r] = sum_c rows[r][c] * x[t * x_stride + c], r < rows.rows <= kTileRows, in the order
  // above; products are not rounded before they are added. x holds rows.cols columns per token, padded with
  // zeros to a multiple of kLanes. Entries for r >= rows.rows are unspecified.
  void (*int8_dots)(const Int8Rows& rows, const float* x, int64_t x_stride, int64_t tokens, float* out);
};

// Each defined by its isa/kernels_<isa>.cpp, where that is built.
extern const Kernels kScalarKernels, kAvx2Kernels, kAvx512Kernels, kNeonKernels;

}  // namespace lb2::cpu
