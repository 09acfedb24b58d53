// Loads one slice of activations into registers, scales it and finds its largest magnitude.
//
// A warp handles one slice (512 columns) of one token; a lane handles two runs of 8 columns. Columns past the
// end are zero, so the pad bits of signs and words past the end of a row do not matter.
#pragma once

#include "cuda/device.h"
#include "cuda/params.h"

namespace lb2::cuda {

constexpr int kRunCols = 8;
constexpr int kLaneCols = 2 * kRunCols;

// What reading one token's slice takes.
struct SliceSource {
  const char* row;     // of the token, in part 0
  const float* scale;  // unused where nothing is scaled
  int64_t part_bytes;
  int32_t num_parts;
  int32_t cols;
  lb2_dtype dtype;
};

LB2_DEVICE SliceSource slice_source(const LaunchParams& params, const Term& term, int token) {
  const int element_bytes = params.input_dtype == LB2_FLOAT32 ? 4 : 2;
  return {static_cast<const char*>(term.input) + token * term.input_stride * element_bytes,
          term.scale,
          term.part_stride * element_bytes,
          params.num_parts,
          term.cols,
          params.input_dtype};
}

LB2_DEVICE bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

LB2_DEVICE float half_value(uint32_t bits, lb2_dtype dtype) {
  return dtype == LB2_FLOAT16 ? half_to_float(static_cast<uint16_t>(bits))
                              : bfloat_to_float(static_cast<uint16_t>(bits));
}

// Runs at multiples of 16 bytes, each whole or left out as zeros. Every load of a batch of parts, scales
// included, is under way before the first is waited for.
template <bool kScaled>
LB2_DEVICE void load_runs_aligned(const SliceSource& source, const int (&cols)[2], const bool (&whole)[2],
                                  float (&out)[kLaneCols]) {
  Words4 scale[4];
  if constexpr (kScaled) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scale[i] = whole[i / 2] ? load_words4(source.scale + cols[i / 2] + i % 2 * 4) : Words4{};
  }
  if (source.dtype == LB2_FLOAT32) {
    constexpr int kAtOnce = 2;  // parts
#pragma unroll 1
    for (int part = 0; part < source.num_parts; part += kAtOnce) {
      Words4 values[kAtOnce][4];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          values[j][i] =
              whole[i / 2] && part + j < source.num_parts
                  ? load_words4(source.row + (part + j) * source.part_bytes + (cols[i / 2] + i % 2 * 4) * 4)
                  : Words4{};
#pragma unroll
      for (int i = 0; i < kLaneCols; ++i) {
        const float first = bits_float(values[0][i / 4].w[i % 4]);
        out[i] = part == 0 ? first : out[i] + first;
#pragma unroll
        for (int j = 1; j < kAtOnce; ++j) out[i] += bits_float(values[j][i / 4].w[i % 4]);
      }
    }
  } else {
    Words4 values[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) values[i] = whole[i] ? load_words4(source.row + cols[i] * 2) : Words4{};
#pragma unroll
    for (int i = 0; i < kLaneCols; ++i) {
      const uint32_t two = values[i / kRunCols].w[i % kRunCols / 2];
      out[i] = half_value(i % 2 == 0 ? two & 0xFFFFu : two >> 16, source.dtype);
    }
  }
  if constexpr (kScaled) {
#pragma unroll
    for (int i = 0; i < kLaneCols; ++i) out[i] *= bits_float(scale[i / 4].w[i % 4]);
  }
}

// One element, parts added in order; zero past the end.
template <bool kScaled>
LB2_DEVICE float load_column(const SliceSource& source, int col) {
  if (col >= source.cols) return 0.0f;
  float value;
  if (source.dtype == LB2_FLOAT32) {
    value = reinterpret_cast<const float*>(source.row)[col];
#pragma unroll 1
    for (int part = 1; part < source.num_parts; ++part)
      value += reinterpret_cast<const float*>(source.row + part * source.part_bytes)[col];
  } else {
    value = half_value(reinterpret_cast<const uint16_t*>(source.row)[col], source.dtype);
  }
  return kScaled ? value * source.scale[col] : value;
}

// Fills the runs that `ragged` names, one element at a time. The loop is not unrolled, as it is rarely taken:
// the values go around in a ring instead of being indexed.
template <bool kScaled>
LB2_DEVICE void load_runs_ragged(const SliceSource& source, const int (&cols)[2], const bool (&ragged)[2],
                                 float (&out)[kLaneCols]) {
#pragma unroll 1
  for (int i = 0; i < kRunCols; ++i)
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      float* values = out + run * kRunCols;
      const float last = ragged[run] ? load_column<kScaled>(source, cols[run] + i) : values[0];
#pragma unroll
      for (int j = 0; j + 1 < kRunCols; ++j) values[j] = values[j + 1];
      values[kRunCols - 1] = last;
    }
}

// out[i] = scale * input, or the input as it is, of the columns cols[0] .. + 7 and cols[1] .. + 7, zero past
// the end; parts are added in order.
template <bool kScaled = true>
LB2_DEVICE void load_runs(const SliceSource& source, const int (&cols)[2], float (&out)[kLaneCols]) {
  const int element_bytes = source.dtype == LB2_FLOAT32 ? 4 : 2;
  // Runs start at multiples of 8 columns, so rows, parts and scales decide.
  const bool aligned = aligned16(source.row + cols[0] * element_bytes) &&
                       (!kScaled || aligned16(source.scale + cols[0])) &&
                       (source.num_parts == 1 || (source.part_bytes & 15) == 0);
  bool whole[2], ragged[2];
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    whole[run] = aligned && cols[run] + kRunCols <= source.cols;
    ragged[run] = !whole[run] && cols[run] < source.cols;
  }
  load_runs_aligned<kScaled>(source, cols, whole, out);
  if (ragged[0] || ragged[1]) load_runs_ragged<kScaled>(source, cols, ragged, out);
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

// 2^shift as a product of two floats; -252 <= shift <= 252.
struct Shift {
  float first, second;
  LB2_DEVICE explicit Shift(int shift)
      : first(power_of_two(shift / 2)), second(power_of_two(shift - shift / 2)) {}
};

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

LB2_DEVICE float not_a_number() { return bits_float(0x7FC00000u); }

}  // namespace lb2::cuda
