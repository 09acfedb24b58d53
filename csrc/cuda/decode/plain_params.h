// Parameters of the plain decode kernels: calls of few terms whose rows are whole and aligned, with nothing
// around them. They are a fifth of DecodeParams: a launch passes less, and a block touches fewer lines of
// constant memory.
#pragma once

#include "cuda/params.h"
#include "cuda/plan/plan.h"

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

// From five tokens on, blocks convert activations themselves if no warp has more turns at it than these. By
// sass-path a turn takes 800 cycles where the next one's loads are under way meanwhile, as they are where x
// has 16 bits, else 1100; a launch that converts takes about 1300, 600 to start the next one, and its result
// must be copied.
constexpr int kPlainTurns = 2, kPlainTurnsOfHalves = 4;

// Fills *plain, or returns false where the call needs the other kernels: extras, too much to convert, more
// terms, runs of 8 columns that are not whole, rows that do not start at multiples of 16 bytes, more items
// than are staged at once.
LB2_API bool plain_params(const lb2_cuda_launch& launch, const DecodeParams& params,
                          PlainParams* plain) noexcept;

// A launch of the decode kernels as it is queued.
struct DecodeLaunch {
  lb2_cuda_launch launch;
  DecodeParams params;
  PlainParams plain;
  bool is_plain;
};

// Fills *next with launch `index` of the plan for the tokens [first, first + tokens) of the call, or returns
// false for a conversion that the launch after it does itself. `queued`: whether a launch of these tokens has
// been queued before.
LB2_API bool next_decode_launch(const Layers& layers, const Plan& plan, int index, int64_t first,
                                int64_t tokens, bool queued, char* workspace, DecodeLaunch* next) noexcept;

}  // namespace lb2::cuda
