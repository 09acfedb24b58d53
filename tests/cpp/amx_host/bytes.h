// csrc/cpu/prepacked/tiles/bytes_avx512.h in plain C++, by the same tables.

struct Expander {
  void expand(const char* words, char* lower, char* upper) const {
    for (int half = 0; half < 2; ++half)
      for (int q = 0; q < kWordQuarters; ++q)
        for (int b = 0; b < 64; ++b) {
          char block[kBlockBytes];  // in the order of lanes, whatever the architecture's own is
          for (int64_t row = 0; row < kBlockRows; ++row) {
            const uint16_t word = load_word(words + row_offset(row));
            std::memcpy(block + (row % 16) * 4 + row / 16 * 2, &word, 2);
          }
          uint64_t bits;
          std::memcpy(&bits, block + b / 8 * 8, 8);
          const int shift = kBitControls.bytes[half][q][b];
          const uint64_t turned = shift == 0 ? bits : bits >> shift | bits << (64 - shift);
          (half == 0 ? lower : upper)[64 * q + b] = static_cast<char>(turned & 0x80u);
        }
  }
};

inline void prefetch(const char*) {}

inline Magnitudes magnitudes(const float* z, int64_t words) {
  float most = 0.0f, total[kLanes] = {};
  for (int64_t i = 0; i < words * kWordCols; ++i) {
    const float value = __builtin_fabsf(z[i]);
    if (value > most) most = value;
    total[i % kWordCols] += value;
  }
  return {most, tree_sum(total)};
}

// To the nearest integer, ties to even; 0 for what is not finite.
inline int32_t nearest(float value) {
  return value - value == 0.0f ? static_cast<int32_t>(__builtin_nearbyintf(value)) : 0;
}

template <int kPlanes>
inline void round_to_planes(const float* z, int64_t words, float factor, int64_t plane_bytes, char* planes,
                            int32_t* sums) {
  std::memset(planes, 0, static_cast<size_t>(kPlanes * plane_bytes));
  sums[0] = sums[kPlanes - 1] = 0;
  for (int64_t w = 0; w < words; ++w)
    for (int64_t c = 0; c < kWordCols; ++c) {
      const int32_t y = nearest(z[w * kWordCols + c] * factor);
      const int8_t low = static_cast<int8_t>(y), high = static_cast<int8_t>((y - low) / 256);
      const int64_t at = w * 16 + c;
      planes[at] = kPlanes == 1 ? low : high;
      if (kPlanes == 2) planes[plane_bytes + at] = low;
      sums[kPlanes - 1] += low;
      if (kPlanes == 2) sums[0] += high;
    }
}

inline void store_sums(int32_t value, char* out) {
  for (int i = 0; i < 16; ++i) std::memcpy(out + 4 * i, &value, 4);
}

template <int kPlanes>
inline void finish_rows(const int32_t* first, const int32_t* second, float unit, bool add, float* rows) {
  for (int i = 0; i < 16; ++i) {
    const int32_t sum = kPlanes == 2 ? first[i] * 256 + second[i] : first[i];
    const float value = static_cast<float>(sum) * unit;
    rows[i] = add ? rows[i] + value : value;
  }
}
