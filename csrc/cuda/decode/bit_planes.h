// Activations as bit planes: signs go into 1-bit MMAs as they lie in memory.
//
// A slice of a token becomes integers q = rint(value / scale), and those become planes of bits with weights
// w_b. A sign is 1 - 2 bit, so that sum_k sign_k q_k = sum_k q_k - 2 sum_b w_b popcount(bits & plane_b): one
// m16n8k256 MMA counts 16 rows against 8 planes. A slice is summed in integers; slices add up in fp32.
#pragma once

#include "cuda/decode/sizes.h"
#include "cuda/staging.h"

namespace lb2::cuda {

constexpr int kPlaneSliceBytes = kSliceCols / 8;

// The 16 x 16 bit matrix that r[i] = rows i (low half) and i + 8 (high half) hold, transposed.
LB2_DEVICE void transpose_16x16(uint32_t (&r)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    r[i] = (r[i] & 0xFF0000FFu) | ((r[i] & 0x0000FF00u) << 8) | ((r[i] & 0x00FF0000u) >> 8);
  constexpr uint32_t kMasks[3] = {0x0F0F0F0Fu, 0x33333333u, 0x55555555u};
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int distance = 4 >> step;
    const uint32_t mask = kMasks[step];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & distance) continue;
      const uint32_t low = r[i], high = r[i + distance];
      r[i] = (low & mask) | ((high & mask) << distance);
      r[i + distance] = ((low & ~mask) >> distance) | (high & ~mask);
    }
  }
}

// kPlanes: 16 or 8 planes of a two's-complement integer; 2 stand for signs (all valid columns with weight 1,
// negative ones with weight -2).
template <int kPlanes>
struct BitPlanes {
  static constexpr bool kSigns = kPlanes == 2;
  static constexpr lb2_activation kActivation = kPlanes == 16  ? LB2_ACTIVATION_INT16
                                                : kPlanes == 8 ? LB2_ACTIVATION_INT8
                                                               : LB2_ACTIVATION_SIGN;
  static constexpr int kTokensPerTile = kTileColumns >= kPlanes ? kTileColumns / kPlanes : 1;
  static constexpr int kTilesPerToken = kPlanes > kTileColumns ? kPlanes / kTileColumns : 1;
  // Tokens that one thread keeps sums of: with a token in more than one column pair, each thread of a quad
  // has a part of all; else it has tokens of its own.
  static constexpr bool kPartial = !kSigns;

  template <int kTokens>
  static constexpr int kTiles =
      kSigns ? (kTokens + kTokensPerTile - 1) / kTokensPerTile : kTokens * kTilesPerToken / kTokensPerTile;
  static constexpr int kTileBytes = kTileColumns * kPlaneSliceBytes;

  // First columns of a lane's two runs: 16 columns in a row.
  static constexpr int kRunPitch = kRunCols;  // between the two
  LB2_DEVICE static int first_run(int lane) { return lane * kLaneCols; }

  // Stages one slice of one token; `valid` is the number of its columns. Returns its scale and sum of q.
  LB2_DEVICE static void stage(const float (&values)[kLaneCols], int lane, int valid, int token,
                               unsigned char* tiles, float* scale, int32_t* sum) {
    uint32_t rows[8];
    int32_t total = 0;
    const Magnitude most = slice_magnitude(values);
    if constexpr (kSigns) {
      float magnitude = 0.0f;
      uint32_t ones = 0, negative = 0;
#pragma unroll
      for (int i = 0; i < kLaneCols; ++i) {
        const bool inside = lane * kLaneCols + i < valid;
        const bool below = inside && values[i] < 0.0f;
        magnitude += bits_float(float_bits(values[i]) & 0x7FFFFFFFu);
        ones |= inside ? 1u << i : 0u;
        negative |= below ? 1u << i : 0u;
      }
      total = popcount(ones) - 2 * popcount(negative);
      magnitude = warp_sum(magnitude);
      rows[0] = ones;
      rows[1] = negative;
      if (lane == 0) *scale = most.finite() ? magnitude / static_cast<float>(valid) : not_a_number();
    } else {
      constexpr float kLimit = kPlanes == 16 ? 32767.0f : 127.0f;
      // Adding 1.5 * 2^23 rounds to an integer and leaves it, as two's complement, in the low bits.
      constexpr float kRounder = 12582912.0f;
      constexpr uint32_t kRounderBits = 0x4B400000u;
      // The largest is brought into [1, 2) first: neither its inverse nor the scale leaves the range then.
      const Shift down(-most.exponent()), up(most.exponent());
      const float largest = bits_float(most.bits) * down.first * down.second;
      const float factor = most.bits == 0 ? 0.0f : down.second * fast_divide(kLimit, largest);
      uint32_t sum_bits = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t low = float_bits(fused_multiply_add(values[i] * down.first, factor, kRounder));
        const uint32_t high = float_bits(fused_multiply_add(values[i + 8] * down.first, factor, kRounder));
        sum_bits += low + high;
        rows[i] = (low & 0xFFFFu) | (high << 16);
      }
      total = static_cast<int32_t>(sum_bits - kLaneCols * kRounderBits);
      transpose_16x16(rows);
      const float inverse = most.finite() ? largest * (1.0f / kLimit) * up.first * up.second : not_a_number();
      if (lane == 0) *scale = inverse;
    }
    total = warp_sum(total);
    if (lane == 0) *sum = total;
    // Plane b of a token is column b of its tiles: 64 bytes, of which a lane has two.
#pragma unroll
    for (int b = 0; b < kPlanes; ++b) {
      const uint32_t word = kSigns ? rows[b] : b < 8 ? rows[b] & 0xFFFFu : rows[b - 8] >> 16;
      reinterpret_cast<uint16_t*>(tiles + (token * kPlanes + b) * kPlaneSliceBytes)[lane] =
          static_cast<uint16_t>(word);
    }
  }

  // Sums of one thread: those of its two rows for every token, or for every tile.
  template <int kTokens>
  static constexpr int kSlots = kPartial ? kTokens : kTiles<kTokens>;

  // Registers that a slot takes, roughly; emulated MMAs take more.
  static constexpr int kSlotCost = kTilesPerToken * (kOneBitEmulated ? 4 : 1);

  // Adds one slice of signs, the words of rows g and g + 8 that the lane holds, times the scales of the rows.
  template <int kTokens>
  LB2_DEVICE static void add(const Words4& low, const Words4& high, const unsigned char* tiles_data,
                             const float* scales, const int32_t* slice_sums, int lane,
                             const float (&row_scale)[2], float (&sums)[kSlots<kTokens>][2]) {
    const int group = lane / 4, quad = lane % 4;
    const unsigned char* lane_data = tiles_data + group * kPlaneSliceBytes + quad * 16;
#pragma unroll
    for (int slot = 0; slot < kSlots<kTokens>; ++slot) {
      int32_t rows[2] = {0, 0};
#pragma unroll
      for (int tile = 0; tile < kTilesPerToken; ++tile) {
        const Words4 planes = load_words4(lane_data + (slot * kTilesPerToken + tile) * kTileBytes);
        int32_t counts[4] = {0, 0, 0, 0};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t a[4] = {low.w[2 * half], high.w[2 * half], low.w[2 * half + 1],
                                 high.w[2 * half + 1]};
          const uint32_t b[2] = {planes.w[2 * half], planes.w[2 * half + 1]};
          mma_b1_and(counts, a, b);
        }
        const int32_t even = kSigns ? 1 : 1 << (tile * kTileColumns + 2 * quad);
        const int32_t top = tile + 1 == kTilesPerToken && quad == 3 ? -2 : 2;
        const int32_t odd = kSigns ? -2 : even * top;
#pragma unroll
        for (int row = 0; row < 2; ++row) rows[row] += counts[2 * row] * even + counts[2 * row + 1] * odd;
      }
      const int token = kPartial ? slot : slot * kTokensPerTile + quad;
      const int32_t base = kPartial && quad != 0 ? 0 : slice_sums[token];
#pragma unroll
      for (int row = 0; row < 2; ++row)
        sums[slot][row] = fused_multiply_add(scales[token] * row_scale[row],
                                             static_cast<float>(base - 2 * rows[row]), sums[slot][row]);
    }
  }

  // Calls store(token, row half, sum) once for every token and row of the warp's tile.
  template <int kTokens, typename Store>
  LB2_DEVICE static void finish(float (&sums)[kSlots<kTokens>][2], int lane, const Store& store) {
    const int quad = lane % 4;
#pragma unroll
    for (int slot = 0; slot < kSlots<kTokens>; ++slot)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float sum = sums[slot][row];
        if constexpr (kPartial) {
          sum += shuffle_xor(sum, 1);
          sum += shuffle_xor(sum, 2);
          if (quad == slot % 4) store(slot, row, sum);
        } else {
          const int token = slot * kTokensPerTile + quad;
          if (token < kTokens) store(token, row, sum);
        }
      }
  }
};

}  // namespace lb2::cuda
