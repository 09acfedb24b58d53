// Activations as float16: signs are expanded to +-1 in registers and go into float16 MMAs.
//
// A slice of a token is scaled by a power of two that brings its largest magnitude to [2^14, 2^15), and each
// activation becomes one float16, or two (the second the first one's error, scaled by 2^11) for 22 bits.
// Columns lie in the order in which bits j and j + 16 of a word give the two halves of a register. Sums over
// a slice are the tensor core's, in fp32; slices add up in fp32 outside it, which keeps its chains, that
// truncate, short.
#pragma once

#include "cuda/decode/bit_planes.h"

namespace lb2::cuda {

// kTerms: float16 numbers per activation, 1 or 2.
template <int kTerms>
struct SignHalves {
  static constexpr lb2_activation kActivation = kTerms == 1 ? LB2_ACTIVATION_FLOAT16 : LB2_ACTIVATION_EXACT;
  static constexpr int kTokensPerTile = kTileColumns / kTerms;
  static constexpr int kSlotCost = 1;                       // see BitPlanes
  static constexpr int kColumnBytes = kSliceCols * 2 + 64;  // 64 apart in banks
  static constexpr int kTileBytes = kTileColumns * kColumnBytes;
  static constexpr int kTopExponent = 14;
  static constexpr int kTermShift = 11;

  template <int kTokens>
  static constexpr int kTiles = (kTokens + kTokensPerTile - 1) / kTokensPerTile;

  // A lane has bits 8 h .. 8 h + 7 and those 16 further of a word; 8 lanes in a row write to 4 quads'
  // columns.
  LB2_DEVICE static int word_of(int lane) { return lane / 2 % 4 * 4 + lane / 8; }
  LB2_DEVICE static int first_run(int lane) { return word_of(lane) * LB2_WORD_BITS + lane % 2 * kRunCols; }
  static constexpr int kRunPitch = 16;  // between a lane's two runs

  LB2_DEVICE static void stage(const float (&values)[kLaneCols], int lane, int, int token,
                               unsigned char* tiles, float* scale, int32_t*) {
    const Magnitude most = slice_magnitude(values);
    const Shift up(kTopExponent - most.exponent()), down(most.exponent() - kTopExponent);
    uint32_t terms[kTerms][kRunCols];  // column i in the low half, i + 16 in the high one
#pragma unroll
    for (int i = 0; i < kRunCols; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float rest = values[half * kRunCols + i] * up.first * up.second;
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          const uint16_t bits = float_to_half(rest);
          rest = (rest - half_to_float(bits)) * power_of_two(kTermShift);
          terms[term][i] = half == 0 ? bits : terms[term][i] | static_cast<uint32_t>(bits) << 16;
        }
      }
    // 16 bytes are the b0, b1 of two MMAs; those of a quad's lanes lie side by side (bank conflicts).
    const int quad = word_of(lane) / 4, index = word_of(lane) % 4;
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const int column = token * kTerms + term;
      unsigned char* data = tiles + column * kColumnBytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int unit = (index * 4 + (lane % 2) * 2 + i) * 4 + quad;
        Words4 four;
#pragma unroll
        for (int j = 0; j < 4; ++j) four.w[j] = terms[term][4 * i + j];
        *reinterpret_cast<Words4*>(data + unit * 16) = four;
      }
    }
    if (lane == 0) *scale = most.finite() ? down.first * down.second : not_a_number();
  }

  template <int kTokens>
  static constexpr int kSlots = kTiles<kTokens> * (kTerms == 1 ? 2 : 1);

  template <int kTokens>
  LB2_DEVICE static void add(const Words4& low, const Words4& high, const unsigned char* tiles_data,
                             const float* scales, const int32_t*, int lane, const float (&row_scale)[2],
                             float (&sums)[kSlots<kTokens>][2]) {
    constexpr int kCount = kTiles<kTokens>;
    const int group = lane / 4, quad = lane % 4;
    const unsigned char* lane_data = tiles_data + group * kColumnBytes + quad * 16;
    float counts[kCount][4];
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) counts[tile][i] = 0.0f;
#pragma unroll
    for (int index = 0; index < 4; ++index)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int bit = 4 * q + 2 * i;
          a[i][0] = sign_pair_f16(low.w[index], bit);
          a[i][1] = sign_pair_f16(high.w[index], bit);
          a[i][2] = sign_pair_f16(low.w[index], bit + 1);
          a[i][3] = sign_pair_f16(high.w[index], bit + 1);
        }
#pragma unroll
        for (int tile = 0; tile < kCount; ++tile) {
          const Words4 b = load_words4(lane_data + tile * kTileBytes + (index * 4 + q) * 64);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t pair[2] = {b.w[2 * i], b.w[2 * i + 1]};
            mma_f16(counts[tile], a[i], pair);
          }
        }
      }
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float even = counts[tile][2 * row], odd = counts[tile][2 * row + 1];
        if constexpr (kTerms == 1) {
          const int token = tile * kTileColumns + 2 * quad;
#pragma unroll
          for (int i = 0; i < 2; ++i)
            sums[2 * tile + i][row] = fused_multiply_add(scales[token + i] * row_scale[row],
                                                         i == 0 ? even : odd, sums[2 * tile + i][row]);
        } else {
          const float both = fused_multiply_add(odd, power_of_two(-kTermShift), even);
          sums[tile][row] = fused_multiply_add(scales[tile * kTokensPerTile + quad] * row_scale[row], both,
                                               sums[tile][row]);
        }
      }
  }

  template <int kTokens, typename Store>
  LB2_DEVICE static void finish(float (&sums)[kSlots<kTokens>][2], int lane, const Store& store) {
    const int quad = lane % 4;
#pragma unroll
    for (int slot = 0; slot < kSlots<kTokens>; ++slot) {
      const int token =
          kTerms == 1 ? (slot / 2) * kTileColumns + 2 * quad + slot % 2 : slot * kTokensPerTile + quad;
#pragma unroll
      for (int row = 0; row < 2; ++row)
        if (token < kTokens) store(token, row, sums[slot][row]);
    }
  }
};

}  // namespace lb2::cuda
