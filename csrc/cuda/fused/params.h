// What the kernel of both stages gets, by value, and the sizes that planning and it must agree on.
#pragma once

#include "cuda/gemm/sizes.h"

namespace lb2::cuda {

constexpr int kFusedTokensLog2 = 5;
constexpr int kFusedTokens = 1 << kFusedTokensLog2;         // of a block, or of the blocks of a cluster
constexpr int kFusedRowTiles = 2;                           // of a warp at once
constexpr int kFusedUnitRows = kFusedRowTiles * kTileRows;  // of the last stage: a warp's at once
constexpr int kFusedChunkRows = kWarps * kFusedUnitRows;    // of a first stage: a block's at once
constexpr int kFusedGroups = kFusedTokens / kGroupTokens;
// A layer, or a group of layers, of more hardly has room, and takes the GEMM.
constexpr int kFusedPaths = 8;
// Blocks of a cluster: no more are portable. Parts of GPUs may have room for fewer, see launch.cu.
constexpr int kFusedMostBlocks = 8;

// A distinct first stage: signs [rank, cols] applied to scale[cols] * input.
struct FusedFirst {
  const float* scale;
  const uint32_t* words;
  int64_t word_stride;
  int32_t rank;
  int32_t row;  // of the first one among the latents of a token in shared memory
};

// Signs [rows of its layer, rank] applied to scale[rank] times the latents of a first stage.
struct FusedTerm {
  const float* scale;
  const float* row_scale;
  const uint32_t* words;
  int64_t word_stride;
  int32_t rank, slices;
  int32_t first;   // index of the first stage
  int32_t offset;  // bytes before its latents as the tensor cores take them
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
  int32_t blocks_log2;  // of a cluster, which share the slices, the tokens' latents and the units
  int32_t part_pitch;   // floats between the latents of two tokens
  int32_t part_offset, store_offset;  // into shared memory: see below
  lb2_dtype dtype;
};

// Converted activations of a slice, of all tokens; two of these, one being made.
constexpr int fused_buffer_bytes(lb2_activation activation) {
  return kFusedGroups * gemm_block_bytes(activation);
}
// Latents are laid out likewise, but that what a term does not have is left out: of a group of tokens, so
// many bytes for each index, and a tail.
constexpr int fused_index_bytes(lb2_activation activation) {
  return gemm_steps(activation) / kSliceIndices * gemm_step_bytes(activation);
}
// A warp's outputs on their way to memory, [tokens][rows], padded (bank conflicts).
constexpr int kFusedStorePitch = kFusedUnitRows + 4;
constexpr int kFusedStoreBytes = kWarps * kFusedTokens * kFusedStorePitch * 4;

// Shared memory of a block: what was converted for the first stage gives its room to the latents as they are
// for the second; parts of the latents, [parts][tokens][pitch], come after it. Outputs have room that is free
// by then: after the latents or, if that is less, in the place of the parts.
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
