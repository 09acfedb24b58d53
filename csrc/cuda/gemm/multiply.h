// Work of a warp of the GEMM or of the fused kernel on its tiles of rows and tokens: products of a step, the
// end of a slice, outputs. The order of all additions is fixed here.
#pragma once

#include "cuda/gemm/operand.h"

namespace lb2::cuda {

template <typename T, int kRowTiles, int kColumnTiles>
LB2_DEVICE void set_zero(T (&sums)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i)
    sums[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] = T{0};
}

// Adds the products of step `step` of a word: `words` are the lane's of rows g and g + 8 of each tile, `data`
// the lane's 16 bytes of the step for the first tile of tokens, `tile_bytes` before those of the next. Of the
// sums, those of the first kRowTiles are added to.
template <typename Operand, int kRowTiles, int kColumnTiles, int kSumTiles>
LB2_DEVICE void multiply_step(const uint32_t (&words)[kRowTiles][2], int step, const unsigned char* data,
                              int tile_bytes, typename Operand::Sum (&sums)[kSumTiles][kColumnTiles][4]) {
  uint32_t a[2][kRowTiles][4];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        a[i][tile][j] = Operand::expand(words[tile][j % 2], step * 4 + 2 * i + j / 2);
#pragma unroll
  for (int term = 0; term < Operand::kTerms; ++term) {
    Words4 b[kColumnTiles];
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile)
      b[tile] = load_words4(data + tile * tile_bytes + term * kWarpLanes * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int row = 0; row < kRowTiles; ++row)
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          const uint32_t pair[2] = {b[tile].w[2 * i], b[tile].w[2 * i + 1]};
          Operand::multiply(sums[row][tile], a[i][row], pair);
        }
  }
}

// Sums leave the tensor core's accumulators.
template <int kRowTiles, int kColumnTiles>
LB2_DEVICE void end_chains(float (&sums)[kRowTiles][kColumnTiles][4],
                           float (&chains)[kRowTiles][kColumnTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i) {
    float& sum = sums[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4];
    chains[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] += sum;
    sum = 0.0f;
  }
}

// total += a slice's sums (those of its chains, where they are shorter) times the scales of tokens and rows.
// `tails` are the slice's for the first tile of tokens, at the lane's first token.
template <typename Operand, int kRowTiles, int kColumnTiles>
LB2_DEVICE void add_slice(const unsigned char* tails, const float (&row_scale)[kRowTiles][2],
                          const typename Operand::Sum (&sums)[kRowTiles][kColumnTiles][4],
                          const float (&chains)[kRowTiles][kColumnTiles][4],
                          float (&total)[kRowTiles][kColumnTiles][4], int tail_stride = kGemmTailBytes) {
#pragma unroll
  for (int row = 0; row < kRowTiles; ++row)
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const float* scale = reinterpret_cast<const float*>(tails + tile * tail_stride);
      const int32_t* all = reinterpret_cast<const int32_t*>(scale) + kGroupTokens;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum =
            Operand::kShortChains ? chains[row][tile][i] : Operand::value(sums[row][tile][i], all[i % 2]);
        // Rounded before it is added: where slices are parts of their own, it is stored.
        total[row][tile][i] += multiply_rounded(scale[i % 2] * row_scale[row][i / 2], sum);
      }
    }
}

// Whether four outputs of a token, from a multiple of four on, can be stored at once.
LB2_DEVICE bool is_wide(const Group& group, lb2_dtype dtype) {
  const int element_bytes = dtype == LB2_FLOAT32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(group.output) % (4 * element_bytes) == 0 &&
         (group.output_stride & 3) == 0;
}

// Four outputs, bias included.
LB2_DEVICE void store_sums(const Group& group, lb2_dtype dtype, int64_t at, int row, const Words4& sums,
                           bool wide) {
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = bits_float(sums.w[i]);
    if (group.bias != nullptr && row + i < group.rows) values[i] += group.bias[row + i];
  }
  if (dtype == LB2_FLOAT32) {
    float* target = static_cast<float*>(group.output) + at;
    if (wide && row + 4 <= group.rows) {
      Words4 words;
#pragma unroll
      for (int i = 0; i < 4; ++i) words.w[i] = float_bits(values[i]);
      *reinterpret_cast<Words4*>(target) = words;
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row + i < group.rows) target[i] = values[i];
    return;
  }
  uint16_t halves[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    halves[i] = dtype == LB2_FLOAT16 ? float_to_half(values[i]) : float_to_bfloat(values[i]);
  uint16_t* target = static_cast<uint16_t*>(group.output) + at;
  if (wide && row + 4 <= group.rows) {
    struct alignas(8) Words2 {
      uint32_t w[2];
    };
    *reinterpret_cast<Words2*>(target) = {{halves[0] | static_cast<uint32_t>(halves[1]) << 16,
                                           halves[2] | static_cast<uint32_t>(halves[3]) << 16}};
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row + i < group.rows) target[i] = halves[i];
}

}  // namespace lb2::cuda
