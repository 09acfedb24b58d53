// The conversion before a GEMM: all slices of activations to tensor-core layout, once for all blocks.
#pragma once

#include "cuda/gemm/operand.h"

namespace lb2::cuda {

template <typename Operand>
LB2_DEVICE unsigned char* converted_block(const Term& term, int group, int slice) {
  return term.converted + (static_cast<int64_t>(group) * term.slices + slice) * Operand::kBlockBytes;
}

// Indices of a slice that hold columns; the others are neither converted nor multiplied.
LB2_DEVICE int slice_indices(int cols, int slice) {
  const int left = cols - slice * kSliceCols;
  return left >= kSliceCols ? kSliceIndices : (left + kIndexCols - 1) / kIndexCols;
}

// A token's slice, converted by its warp, into the block of memory of a group of tokens.
template <typename Operand>
LB2_DEVICE void store_converted(const float (&values)[kLaneCols], int lane, int column, bool inside,
                                unsigned char* block, int block_bytes) {
  unsigned char* tail = block + block_bytes - kGemmTailBytes;
  Operand::convert(values, lane, column, inside, block, reinterpret_cast<float*>(tail) + column,
                   reinterpret_cast<int32_t*>(tail) + kGroupTokens + column);
}

// Blocks are [slices of all terms, 1, groups of tokens], a warp for each token.
template <typename Operand>
LB2_KERNEL(kThreads, 2)
gemm_convert(const LB2_GRID_CONSTANT LaunchParams params) {
  static_assert(kWarps == kGroupTokens, "a warp converts one token of a group");
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = thread_id() % kWarpLanes, column = thread_id() / kWarpLanes;
  const int token = block_z() * kGroupTokens + column;
  if (token >= params.m) return;  // its column of the MMAs keeps whatever is in it: columns do not mix
  int term_index = 0, slice = block_x();
  while (slice >= params.terms[term_index].slices) slice -= params.terms[term_index++].slices;
  const Term& term = params.terms[term_index];
  const int first = slice * kSliceCols + converted_run(lane);
  const int cols[2] = {first, first + 16};
  float values[kLaneCols];
  load_runs(slice_source(params, term, token), cols, values);
  store_converted<Operand>(values, lane, column, lane / 8 < slice_indices(term.cols, slice),
                           converted_block<Operand>(term, block_z(), slice), Operand::kBlockBytes);
}

}  // namespace lb2::cuda
