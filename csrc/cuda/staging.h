// Activations into shared memory: scaled, rounded to what the tensor cores take, slice by slice.
//
// One warp takes one slice (512 columns) of one token; a lane takes two runs of 8 columns. The columns past
// the end are zero, which makes the pad bits of signs, and words past the end of a row, of no account.
#pragma once

#include "cuda/device.h"
#include "cuda/instances.h"

namespace lb2::cuda {

constexpr int kRunCols = 8;
constexpr int kLaneCols = 2 * kRunCols;

// What reading one token's slice takes.
struct SliceSource {
  const char* row;  // of the token, in part 0
  const float* scale;
  int64_t part_bytes;
  int32_t num_parts;
  int32_t cols;
  lb2_dtype dtype;
};

LB2_DEVICE bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

LB2_DEVICE void load_floats(const float* source, int count, float (&out)[kRunCols]) {
  if (count >= kRunCols && aligned16(source)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Words4 four = load_words4(source + 4 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[4 * i + j] = bits_float(four.w[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRunCols; ++i) out[i] = i < count ? source[i] : 0.0f;
}

LB2_DEVICE float half_value(uint32_t bits, lb2_dtype dtype) {
  return dtype == LB2_FLOAT16 ? half_to_float(static_cast<uint16_t>(bits))
                              : bfloat_to_float(static_cast<uint16_t>(bits));
}

LB2_DEVICE void load_halves(const uint16_t* source, int count, lb2_dtype dtype, float (&out)[kRunCols]) {
  if (count >= kRunCols && aligned16(source)) {
    const Words4 eight = load_words4(source);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = half_value(eight.w[i] & 0xFFFFu, dtype);
      out[2 * i + 1] = half_value(eight.w[i] >> 16, dtype);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRunCols; ++i) out[i] = i < count ? half_value(source[i], dtype) : 0.0f;
}

// out[i] = scale * input of columns col .. col + 7, zero past the end; parts are added in order.
LB2_DEVICE void load_run(const SliceSource& source, int col, float* out) {
  const int count = source.cols - col;
  float values[kRunCols], scale[kRunCols];
  if (source.dtype == LB2_FLOAT32) {
    const float* row = reinterpret_cast<const float*>(source.row) + col;
    load_floats(row, count, values);
    for (int part = 1; part < source.num_parts; ++part) {
      float more[kRunCols];
      row = reinterpret_cast<const float*>(reinterpret_cast<const char*>(row) + source.part_bytes);
      load_floats(row, count, more);
#pragma unroll
      for (int i = 0; i < kRunCols; ++i) values[i] += more[i];
    }
  } else {
    load_halves(reinterpret_cast<const uint16_t*>(source.row) + col, count, source.dtype, values);
  }
  load_floats(source.scale + col, count, scale);
#pragma unroll
  for (int i = 0; i < kRunCols; ++i) out[i] = values[i] * scale[i];
}

LB2_DEVICE uint32_t warp_max(uint32_t value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(value, mask);
    value = value > other ? value : other;
  }
  return value;
}

LB2_DEVICE int32_t warp_sum(int32_t value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

LB2_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// 2^exponent for -126 <= exponent <= 127.
LB2_DEVICE float power_of_two(int exponent) {
  return bits_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// The largest magnitude of a slice as 2^exponent * [1, 2); magnitudes are ordered like their bits, NaN last.
struct Magnitude {
  uint32_t bits;
  LB2_DEVICE bool finite() const { return bits < 0x7F800000u; }
  // Subnormals count as 2^-126, so that powers of two either way are normal numbers.
  LB2_DEVICE int exponent() const {
    const int biased = static_cast<int>(bits >> 23);
    return (biased > 0 ? biased : 1) - 127;
  }
};

LB2_DEVICE Magnitude slice_magnitude(const float (&values)[kLaneCols]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kLaneCols; ++i) {
    const uint32_t bits = float_bits(values[i]) & 0x7FFFFFFFu;
    most = most > bits ? most : bits;
  }
  return {warp_max(most)};
}

// value * 2^shift without leaving the range of floats halfway; -252 <= shift <= 252.
LB2_DEVICE float shift_exponent(float value, int shift) {
  const int half = shift / 2;
  return value * power_of_two(half) * power_of_two(shift - half);
}

LB2_DEVICE float not_a_number() { return bits_float(0x7FC00000u); }

}  // namespace lb2::cuda
