// Parameters of the fused kernel, passed by value, and the sizes that planning and the kernel share.
#pragma once

#include "cuda/gemm/sizes.h"

namespace lb2::cuda {

constexpr int kFusedTokensLog2 = 5;
constexpr int kFusedTokens = 1 << kFusedTokensLog2;  // tokens per cluster
constexpr int kFusedRowTiles = 2;                    // tiles of a warp at the same time
constexpr int kFusedUnitRows =
    kFusedRowTiles * kTileRows;  // rows of a warp at the same time, in the last stage
constexpr int kFusedChunkRows =
    kWarps * kFusedUnitRows;  // rows of a block at the same time, in a first stage
constexpr int kFusedGroups = kFusedTokens / kGroupTokens;
// Layers or groups with more paths would hardly fit; they run as a GEMM.
constexpr int kFusedPaths = 8;
// Blocks per cluster: 8 is the portable limit. A partitioned GPU may have room for fewer, see launch.cu.
constexpr int kFusedMostBlocks = 8;

// A distinct first stage: signs [rank, cols] applied to scale[cols] * input.
struct FusedFirst {
  const float* scale;
  const uint32_t* words;
  int64_t word_stride;
  int32_t rank;
  int32_t row;  // its first row among the latents of a token in shared memory
};

// Signs [rows of its layer, rank] applied to scale[rank] times the latents of a first stage.
struct FusedTerm {
  const float* scale;
  const float* row_scale;
  const uint32_t* words;
  int64_t word_stride;
  int32_t rank, slices;
  int32_t first;   // index of the first stage
  int32_t offset;  // of its converted latents, in bytes
};

struct FusedParams {
  FusedFirst firsts[kFusedPaths];
  FusedTerm terms[kFusedPaths];
  Group layers[kFusedPaths];  // first_tile counts units of kFusedUnitRows
  const void* input;
  int64_t input_stride;
  int32_t num_firsts, num_terms, num_layers, num_units;
  int32_t cols, slices;  // K
  int32_t m;
  int32_t blocks_log2;  // blocks per cluster; they share the slices, the latents of the tokens and the units
  int32_t part_pitch;   // floats between the latents of two tokens
  int32_t part_offset, store_offset;  // into shared memory: see below
  lb2_dtype input_dtype, output_dtype;
};

// Converted activations of a slice for all tokens; there are two of these, one being written.
constexpr int fused_buffer_bytes(lb2_activation activation) {
  return kFusedGroups * gemm_block_bytes(activation);
}
// Latents have the same layout without the indices that a term does not have: per group of tokens, that many
// bytes per index, and a tail.
constexpr int fused_index_bytes(lb2_activation activation) {
  return gemm_steps(activation) / kSliceIndices * gemm_step_bytes(activation);
}
// The outputs of a warp before they are stored, [tokens][rows], padded (bank conflicts).
constexpr int kFusedStorePitch = kFusedUnitRows + 4;
constexpr int kFusedStoreBytes = kWarps * kFusedTokens * kFusedStorePitch * 4;

// Shared memory of a block: the converted latents of the second stage replace the converted activations of
// the first; parts of the latents, [parts][tokens][pitch], follow. Outputs use room that is free by then:
// after the latents or, if that takes less in all, in place of the parts.
struct FusedLayout {
  int part_offset, store_offset, bytes;
};
constexpr FusedLayout fused_layout(lb2_activation activation, int latent_bytes, int part_bytes) {
  const int buffers = 2 * fused_buffer_bytes(activation), stored = latent_bytes + kFusedStoreBytes;
  const int early = buffers > stored ? buffers : stored;
  const int least = buffers > latent_bytes ? buffers : latent_bytes;
  const int late = part_bytes > kFusedStoreBytes ? part_bytes : kFusedStoreBytes;
  return early + part_bytes <= least + late ? FusedLayout{early, latent_bytes, early + part_bytes}
                                            : FusedLayout{least, least, least + late};
}

}  // namespace lb2::cuda
