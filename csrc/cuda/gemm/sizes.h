// Sizes of the GEMM, and of the conversion before it, that planning and kernels share.
#pragma once

#include "cuda/params.h"
#include "littlebit2/cuda.h"

namespace lb2::cuda {

// Shared memory that every instance may use: all GPUs of compute capability 8.0 and newer have it.
constexpr int64_t kGemmSharedBytes = 99 * 1024;

constexpr bool has_gemm(lb2_activation activation) {
  return activation == LB2_ACTIVATION_EXACT || activation == LB2_ACTIVATION_FLOAT16 ||
         activation == LB2_ACTIVATION_INT8;
}

// Calls with more tokens than the decode kernels handle at once.
constexpr bool uses_gemm(lb2_activation activation, int64_t tokens, int64_t shared_bytes) {
  return tokens > kMaxTokenTile && has_gemm(activation) && shared_bytes >= kGemmSharedBytes;
}

// Rows of signs and tokens per block.
struct GemmTile {
  int rows, tokens;
};
constexpr GemmTile kGemmTiles[] = {{64, 32}, {128, 32}, {128, 64}, {128, 128}};

// `exact` has a third set of sums, for which the largest tile has no registers left.
constexpr bool has_gemm_tile(lb2_activation activation, int rows, int tokens) {
  for (const GemmTile& tile : kGemmTiles)
    if (tile.rows == rows && tile.tokens == tokens) return activation != LB2_ACTIVATION_EXACT || tokens < 128;
  return false;
}

// Activations are converted in groups of tokens, the columns of one MMA. A slice of a group is a block of
// memory: one part per step, with 16 bytes per lane and term, and a tail with a scale and a sum per token.
constexpr int kGroupTokens = 8;
constexpr int kGemmTailBytes = kGroupTokens * 8;
// Columns of the smallest part of a slice that can be left out where a term ends: one word per lane of a
// quad.
constexpr int kIndexCols = 128;
constexpr int kSliceIndices = kSliceCols / kIndexCols;
constexpr int gemm_terms(lb2_activation activation) { return activation == LB2_ACTIVATION_EXACT ? 2 : 1; }
constexpr int gemm_steps(lb2_activation activation) { return activation == LB2_ACTIVATION_INT8 ? 8 : 16; }
constexpr int gemm_step_bytes(lb2_activation activation) { return kWarpLanes * 16 * gemm_terms(activation); }
constexpr int gemm_block_bytes(lb2_activation activation) {
  return gemm_steps(activation) * gemm_step_bytes(activation) + kGemmTailBytes;
}

// The pipeline has two rings: stages of activations, each with some steps for all tokens of the block, and
// slices of signs and tails.
constexpr int kPipelineStages = 4;
constexpr int kStageBytes = 16 * 1024;
constexpr int gemm_stage_steps(lb2_activation activation, int tokens) {
  return kStageBytes / (tokens / kGroupTokens * gemm_step_bytes(activation));
}
constexpr int gemm_slice_stages(lb2_activation activation, int tokens) {
  return gemm_steps(activation) / gemm_stage_steps(activation, tokens);
}
// Stages of the shortest slice, which has one index; two where the slots of all slices in flight would not
// fit.
constexpr int gemm_least_stages(lb2_activation activation, int tokens) {
  const int index_steps = gemm_steps(activation) / kSliceIndices;
  const int stages = index_steps / gemm_stage_steps(activation, tokens);
  return stages < 2 && tokens == 128 ? 2 : stages < 1 ? 1 : stages;
}
// Slices in shared memory: the one being multiplied, and those of the stages in flight.
constexpr int gemm_slice_slots(lb2_activation activation, int tokens) {
  const int stages = gemm_least_stages(activation, tokens);
  return 1 + (kPipelineStages - 1 + stages - 1) / stages;
}
// Words of the same index of all lanes are together, with padding between indices (bank conflicts).
constexpr int gemm_index_words(int rows) { return rows * 4 + 8; }
constexpr int gemm_slot_bytes(int rows, int tokens) {
  return 4 * gemm_index_words(rows) * 4 + tokens / kGroupTokens * kGemmTailBytes;
}
// The sums of a block before they are stored, [tokens][rows], rows padded (bank conflicts).
constexpr int gemm_sum_pitch(int rows) { return rows + 4; }

// Shared memory of a block that multiplies `slices` slices.
constexpr int gemm_shared_bytes(lb2_activation activation, int rows, int tokens, int64_t slices) {
  const int64_t stages = slices * gemm_slice_stages(activation, tokens);
  const int slots = gemm_slice_slots(activation, tokens);
  const int pipeline = static_cast<int>(stages < kPipelineStages ? stages : kPipelineStages) * kStageBytes +
                       static_cast<int>(slices < slots ? slices : slots) * gemm_slot_bytes(rows, tokens);
  const int sums = tokens * gemm_sum_pitch(rows) * 4;
  return pipeline > sums ? pipeline : sums;
}

}  // namespace lb2::cuda
