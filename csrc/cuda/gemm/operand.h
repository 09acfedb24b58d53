// Operands of the GEMM: activations as float16 (one term or two) or int8, and signs expanded to match.
//
// A lane of a warp that multiplies has words t, 4 + t, 8 + t and 12 + t of its rows' slices (t = lane % 4),
// by index. A step takes four bits of one of them in each half (float16) or quarter (int8) of the word: two
// MMAs, whose registers of A are a bit and those 16, or 8, 16 and 24, further. Activations are converted into
// the same order, 16 bytes of every lane for both MMAs side by side, so that a B fragment is one load without
// bank conflicts.
#pragma once

#include "cuda/gemm/sizes.h"
#include "cuda/staging.h"

namespace lb2::cuda {

// Columns of the lane of a warp that converts a slice of one token: bits 8 h .. 8 h + 7 of a word and those
// 16 further, h = lane % 2.
LB2_DEVICE int converted_word(int lane) { return lane / 2; }
LB2_DEVICE int converted_run(int lane) { return converted_word(lane) * LB2_WORD_BITS + lane % 2 * kRunCols; }

// The 16 bytes of one step and term for the lane that multiplies that word for that token.
LB2_DEVICE unsigned char* converted_unit(unsigned char* block, int word, int quarter, int quarters, int term,
                                         int terms, int token) {
  const int step = word / 4 * quarters + quarter;
  return block + (((step * terms + term) * kWarpLanes) + token * 4 + word % 4) * 16;
}

// kTerms float16 numbers per activation, scaled by a power of two that brings the slice's largest magnitude
// to [2^14, 2^15). The second is the first one's rounding error as it is, at most 2^3: full 22 bits down to
// 2^-17 of the largest, and both terms add up in the same sums.
template <int kTerms_>
struct GemmHalves {
  static constexpr int kTerms = kTerms_;
  static constexpr lb2_activation kActivation = kTerms == 1 ? LB2_ACTIVATION_FLOAT16 : LB2_ACTIVATION_EXACT;
  static constexpr int kBlockBytes = gemm_block_bytes(kActivation);
  static constexpr int kQuarters = 4;
  // Sums leave the tensor core, whose additions truncate, after every fourth of a slice.
  static constexpr bool kShortChains = kTerms == 2;
  static constexpr int kTopExponent = 14;
  using Sum = float;

  LB2_DEVICE static uint32_t expand(uint32_t word, int bit) { return sign_pair_f16(word, bit); }
  LB2_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(c, a, b);
  }
  LB2_DEVICE static float value(Sum sum, int32_t) { return sum; }

  LB2_DEVICE static void convert(const float (&values)[kLaneCols], int lane, int token, bool inside,
                                 unsigned char* block, float* scale, int32_t*) {
    const Magnitude most = slice_magnitude(values);
    const Shift up(kTopExponent - most.exponent()), down(most.exponent() - kTopExponent);
    const int word = converted_word(lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Words4 units[kTerms];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float low = values[4 * i + j] * up.first * up.second;
        float high = values[kRunCols + 4 * i + j] * up.first * up.second;
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          const uint16_t low_bits = float_to_half(low), high_bits = float_to_half(high);
          units[term].w[j] = low_bits | static_cast<uint32_t>(high_bits) << 16;
          low -= half_to_float(low_bits);
          high -= half_to_float(high_bits);
        }
      }
      if (!inside) continue;
#pragma unroll
      for (int term = 0; term < kTerms; ++term)
        *reinterpret_cast<Words4*>(
            converted_unit(block, word, lane % 2 * 2 + i, kQuarters, term, kTerms, token)) = units[term];
    }
    if (lane == 0) *scale = most.finite() ? down.first * down.second : not_a_number();
  }
};

// Integers q = rint(value / scale), scale = max / 127 of the slice. Signs enter as bits: sum_k sign_k q_k =
// sum_k q_k - 2 sum_k bit_k q_k, exactly.
struct GemmInt8 {
  static constexpr int kTerms = 1;
  static constexpr lb2_activation kActivation = LB2_ACTIVATION_INT8;
  static constexpr int kBlockBytes = gemm_block_bytes(kActivation);
  static constexpr int kQuarters = 2;
  static constexpr bool kShortChains = false;
  using Sum = int32_t;

  LB2_DEVICE static uint32_t expand(uint32_t word, int bit) { return word >> bit & 0x01010101u; }
  LB2_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_s8(c, a, b);
  }
  LB2_DEVICE static float value(Sum sum, int32_t all) { return static_cast<float>(all - 2 * sum); }

  LB2_DEVICE static void convert(const float (&values)[kLaneCols], int lane, int token, bool inside,
                                 unsigned char* block, float* scale, int32_t* sum) {
    constexpr float kLimit = 127.0f;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it, as two's complement, in the low bits.
    constexpr float kRounder = 12582912.0f;
    constexpr uint32_t kRounderBits = 0x4B400000u;
    const Magnitude most = slice_magnitude(values);
    // The largest is brought into [1, 2) first: neither its inverse nor the scale leaves the range then.
    const Shift down(-most.exponent()), up(most.exponent());
    const float largest = bits_float(most.bits) * down.first * down.second;
    const float factor = most.bits == 0 ? 0.0f : down.second * fast_divide(kLimit, largest);
    uint32_t sum_bits = 0;
    // The bytes of bits 8 h + i and 16 + 8 h + i, as one number.
    const auto pair = [&](int i) {
      const uint32_t low = float_bits(fused_multiply_add(values[i] * down.first, factor, kRounder));
      const uint32_t high =
          float_bits(fused_multiply_add(values[kRunCols + i] * down.first, factor, kRounder));
      sum_bits += low + high;
      return (low & 0xFFu) | (high & 0xFFu) << 16;
    };
    // The lane keeps four bits of each quarter of the word, and gives the other four to its neighbor.
    const int half = lane % 2;
    Words4 unit;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t first = pair(j), second = pair(4 + j);
      const uint32_t kept = half == 0 ? first : second, given = half == 0 ? second : first;
      const uint32_t got = shuffle_xor(given, 1);
      unit.w[j] = half == 0 ? kept | got << 8 : kept << 8 | got;
    }
    if (inside)
      *reinterpret_cast<Words4*>(
          converted_unit(block, converted_word(lane), half, kQuarters, 0, kTerms, token)) = unit;
    const int32_t total = warp_sum(static_cast<int32_t>(sum_bits - kLaneCols * kRounderBits));
    if (lane != 0) return;
    *sum = total;
    *scale = most.finite() ? largest * (1.0f / kLimit) * up.first * up.second : not_a_number();
  }
};

}  // namespace lb2::cuda
