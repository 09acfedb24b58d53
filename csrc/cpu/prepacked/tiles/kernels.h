// Kernels over prepacked signs for many tokens: products of tiles of bytes, as AMX computes them.
//
// Activations of a token are one plane of 8-bit integers or two, with a scale for each chunk of columns. A
// token's operand of a chunk is
//
//   planes: of each plane, per four words of the chunk 64 bytes: 15 columns and a zero for each word
//   sums:   of each plane, 64 times the sum of the plane, as 16 equal 32-bit integers
//
// Signs become bytes as tiles need them: -128 where the sign is negative, else 0. So the sum of products is
// 64 times what is missing from the sum of the plane: with that to begin with, an accumulator ends at 64
// times the signed sum. Integer sums are exact and do not depend on the order.
//
//  int8:   y = rne(z * (127 / max|z|)), one plane. The integers, scale and results are those of lookup.h.
//  int8x2: y = rne(z * (32512 / max|z|)) = 256 high + low, -128 <= low < 128, two planes.
//          A row's sum is float(64 * sum of y) * ((max|z| * (1 / 32512)) * (1 / 64)).
#pragma once

#include "cpu/prepacked/lookup.h"

namespace lb2::cpu {

constexpr int64_t kTileWords = 4;               // that share 64 bytes of a plane
constexpr int64_t kTileTokens = 16;             // rows of a tile of activations
constexpr float kInt8x2Limit = 32512.0f;        // 127 * 256: the high byte stays within 8 bits
constexpr float kLeastInt8x2Bound = 0x1p-104f;  // below, the scale would lose precision

struct TileKernels {
  LookupMode int8x2, int8;
};

// The fewest tokens of a call that AUTO and INT8 compute with tiles: one full tile of activations. By count,
// a tile of 16 tokens costs what 3 to 4 tokens cost by lookup, and building operands as much again.
constexpr int64_t kLeastTileTokens = 16;

// Defined by isa/kernels_amx.cpp, where that is built.
extern const TileKernels kAmxTileKernels;

}  // namespace lb2::cpu
