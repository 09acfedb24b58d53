// Parameters of the plain decode kernels: calls of few terms whose rows are whole and aligned, with nothing
// around them. They are a fifth of DecodeParams: a launch passes less, and a block touches fewer lines of
// constant memory.
#pragma once

#include "cuda/params.h"
#include "littlebit2/cuda.h"

namespace lb2::cuda {

constexpr int kPlainTerms = 4;

// As Term, with offsets that fit into 32 bits.
struct PlainTerm {
  const char* input;
  const float* scale;
  const uint32_t* words;
  const float* row_scale;  // [rows], or NULL for 1
  int32_t word_stride;
  int32_t input_bytes;  // between tokens
  int32_t part_bytes;   // between the parts of input
  int32_t cols, slices;
};

struct PlainParams {
  int32_t num_groups, num_parts, m;
  int32_t row_warps_log2;
  int32_t signs_early;
  int32_t partial_offset;  // of the sums of the warps in shared memory
  lb2_dtype input_dtype, output_dtype;
  Group groups[kPlainTerms];
  PlainTerm terms[kPlainTerms];
};

// Fills *plain, or returns false where the call needs the other kernels: extras, a conversion ahead, more
// terms, runs of 8 columns that are not whole, rows that do not start at multiples of 16 bytes, more items
// than are staged at once.
LB2_API bool plain_params(const lb2_cuda_launch& launch, const DecodeParams& params,
                          PlainParams* plain) noexcept;

}  // namespace lb2::cuda
