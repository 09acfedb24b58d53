// Sizes of the decode kernels that planning and kernels share. There is one instance per activation mode and
// token tile.
#pragma once

#include "cuda/params.h"
#include "littlebit2/cuda.h"

namespace lb2::cuda {

constexpr int kTokenTiles[] = {1, 2, 4, 8, kMaxTokenTile};
constexpr int kTileColumns = 8;  // columns of one MMA: bit planes, or float16 activations

// Whether a separate launch converts the activations of a token tile. For few tokens, converting them in
// every block costs less than a launch.
constexpr bool converts_ahead(int token_tile) { return token_tile > 4; }

// MMA columns per token.
constexpr int token_columns(lb2_activation activation) {
  return activation == LB2_ACTIVATION_INT16     ? 16
         : activation == LB2_ACTIVATION_INT8    ? 8
         : activation == LB2_ACTIVATION_FLOAT16 ? 1
                                                : 2;
}

constexpr bool is_one_bit(lb2_activation activation) {
  return activation != LB2_ACTIVATION_FLOAT16 && activation != LB2_ACTIVATION_EXACT;
}

// Whether three blocks of few tokens are on an SM at once, where 1-bit MMAs are not emulated.
constexpr bool has_three_blocks(lb2_activation activation) {
  return activation == LB2_ACTIVATION_INT16 || activation == LB2_ACTIVATION_INT8;
}

// Shared memory for a slice of activations: columns, padded to whole tiles, and a scale and a sum for each
// token that fits into them.
constexpr int slice_bytes(lb2_activation activation, int tokens) {
  const int columns = token_columns(activation);
  const int tiles = (tokens * columns + kTileColumns - 1) / kTileColumns;
  const int tokens_per_tile = columns > kTileColumns ? 1 : kTileColumns / columns;
  const int column_bytes = is_one_bit(activation) ? kSliceCols / 8 : kSliceCols * 2 + 64;
  return tiles * kTileColumns * column_bytes + (tiles * tokens_per_tile * 8 + 15) / 16 * 16;
}

// Shared memory for the partial sums of the warps of a block.
constexpr int sums_bytes(int tokens) { return kWarps * kTileRows * tokens * 4; }

// Shared memory of a block that normalizes its tokens itself: sums of squares of each warp.
constexpr int squares_bytes(int tokens) { return kWarps * tokens * 4; }

}  // namespace lb2::cuda
