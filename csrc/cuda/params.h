// Parameters of a kernel launch, passed by value.
#pragma once

#include <cstdint>

#include "littlebit2/littlebit2.h"

namespace lb2::cuda {

constexpr int kWarpLanes = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kTileRowsLog2 = 4;
constexpr int kTileRows = 1 << kTileRowsLog2;  // rows of signs of one MMA
// Columns with one activation scale: 16 words, 4 for each lane of a quad.
constexpr int kSliceCols = 512;
constexpr int kSliceWords = kSliceCols / LB2_WORD_BITS;
constexpr int kMaxTokenTile = 16;

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Signs [rows of its group, cols] applied to scale[cols] * (sum of the parts of input)[m, cols].
struct Term {
  const void* input;
  const float* scale;
  const uint32_t* words;
  const float* row_scale;    // [rows], or NULL for 1
  unsigned char* converted;  // [tile of tokens, slice], if a CONVERT launch wrote it, else unused
  int64_t word_stride;
  int64_t input_stride;  // elements between tokens
  int64_t part_stride;   // elements between the parts of input
  int32_t cols, slices;
};

// Rows of a launch: the sum of the terms, each times its row_scale, plus a bias. In a first stage a group is
// one distinct V, in the last stage the outputs of one layer.
struct Group {
  void* output;       // [parts, m, rows]
  const float* bias;  // [rows] or NULL
  int64_t output_stride;
  int32_t rows;
  int32_t first_tile;  // its first block in x
  int32_t first_term, last_term;
  // Slices of its terms for each block in y, of which the first part_rest have one more.
  int32_t part_slices, part_rest;
};

// Parameters of every kernel. The GEMM needs no others.
struct LaunchParams {
  Term terms[LB2_MAX_PATHS];
  Group groups[LB2_MAX_PATHS];
  int32_t num_terms;
  int32_t num_groups;
  int32_t num_parts;  // parts of the inputs, to be added
  int32_t m;
  // Blocks that the columns are split over. Each stores one part of the output; in the GEMM, one part per
  // slice.
  int32_t splits;
  lb2_dtype input_dtype, output_dtype;
};

// What a call computes around the products of its layers, in its first launches (factor, norm) and its last
// one (function, residual). Only the extended instances read it.
struct Extras {
  // Activations are multiplied by factor + factor_offset: [m, cols], or with a stride of 0 [cols]. NULL:
  // none.
  const void* factor;
  int64_t factor_stride;
  lb2_dtype factor_dtype;
  float factor_offset;
  // RMS normalization: all sums of a token are multiplied by 1 / sqrt(mean of its squared inputs + eps).
  int32_t normed;
  float eps;
  float* norms;  // [m]: that number, where a CONVERT launch writes it, else unused
  // The first function_rows rows of the first group are passed through the function.
  int32_t function_rows;
  lb2_function function;
  const void* residual;  // [m, rows] of the output's type, added to the only group; or NULL
  int64_t residual_stride;
};

// Parameters of the decode kernels and of the kernels that convert for them.
struct DecodeParams : LaunchParams {
  int32_t row_warps_log2;
  int32_t chunk_slices;
  int32_t signs_early;  // 1: the previous kernel did not write signs and scales
  Extras extras;
};

}  // namespace lb2::cuda
