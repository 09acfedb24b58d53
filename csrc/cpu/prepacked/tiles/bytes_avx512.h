// Signs to bytes, activations to planes, and sums to rows, with AVX-512 VBMI and VNNI. Include this after
// tiles/body.h, where elementwise_body.h says. tests/cpp/amx_host has the same in plain C++.

// Expands the words of a block: rows q of the tiles of the lower and the upper rows of the block lie 64 q
// bytes from `lower` and `upper`.
struct Expander {
  // One by one and not arrays in loops, which compilers keep in memory.
  __m512i lower0 = control(0, 0), lower1 = control(0, 1), lower2 = control(0, 2), lower3 = control(0, 3);
  __m512i upper0 = control(1, 0), upper1 = control(1, 1), upper2 = control(1, 2), upper3 = control(1, 3);
  __m512i negative = _mm512_set1_epi8(static_cast<char>(0x80));
  [[gnu::always_inline]] static __m512i control(int half, int q) {
    __m512i bytes = _mm512_load_si512(kBitControls.bytes[half][q]);
    __asm__("" : "+v"(bytes));  // else it is loaded again for every use
    return bytes;
  }
  [[gnu::always_inline]] void store(__m512i bits, __m512i place, char* row) const {
    _mm512_store_si512(row, _mm512_and_si512(_mm512_multishift_epi64_epi8(place, bits), negative));
  }
  [[gnu::always_inline]] void expand(const char* words, char* lower, char* upper) const {
    const __m512i bits = _mm512_loadu_si512(words);
    store(bits, lower0, lower);
    store(bits, lower1, lower + 64);
    store(bits, lower2, lower + 128);
    store(bits, lower3, lower + 192);
    store(bits, upper0, upper);
    store(bits, upper1, upper + 64);
    store(bits, upper2, upper + 128);
    store(bits, upper3, upper + 192);
  }
};

[[gnu::always_inline]] inline void prefetch(const char* address) { _mm_prefetch(address, _MM_HINT_T0); }

inline __m512 word_columns(const float* z) { return _mm512_maskz_loadu_ps((1 << kWordCols) - 1, z); }

// Maximum of the magnitudes of a chunk, and their sum in the order of lookup.h.
inline Magnitudes magnitudes(const float* z, int64_t words) {
  __m512 most = _mm512_setzero_ps(), total = most;
  for (int64_t w = 0; w < words; ++w) {
    const __m512 columns = _mm512_abs_ps(word_columns(z + w * kWordCols));
    most = _mm512_max_ps(most, columns);
    total = _mm512_add_ps(total, columns);
  }
  alignas(64) float lanes[kLanes];
  _mm512_store_ps(lanes, total);
  return {_mm512_reduce_max_ps(most), tree_sum(lanes)};
}

// Writes the planes of z * factor and adds what they hold to their sums.
template <int kPlanes>
inline void round_to_planes(const float* z, int64_t words, float factor, int64_t plane_bytes, char* planes,
                            int32_t* sums) {
  static const struct Select {
    alignas(64) uint16_t words[32];
    alignas(64) uint8_t low[64], high[64];
    constexpr Select() : words(), low(), high() {
      for (int i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(i < 16 ? 2 * i : 32 + 2 * (i - 16));
      for (int i = 0; i < 64; ++i) low[i] = static_cast<uint8_t>(2 * i);
      for (int i = 0; i < 64; ++i) high[i] = static_cast<uint8_t>(2 * i + 1);
    }
  } kSelect;
  const __m512i lower_words = _mm512_load_si512(kSelect.words), low_bytes = _mm512_load_si512(kSelect.low),
                high_bytes = _mm512_load_si512(kSelect.high), ones = _mm512_set1_epi8(1);
  __m512i low_sum = _mm512_setzero_si512(), high_sum = low_sum;
  const __m512 factors = _mm512_set1_ps(factor);
  for (int64_t w = 0; w < words; w += kTileWords, planes += 64) {
    __m512i rounded[kTileWords];
    for (int64_t i = 0; i < kTileWords; ++i)
      rounded[i] = w + i < words
                       ? _mm512_cvtps_epi32(_mm512_mul_ps(word_columns(z + (w + i) * kWordCols), factors))
                       : _mm512_setzero_si512();
    const __m512i first = _mm512_permutex2var_epi16(rounded[0], lower_words, rounded[1]);
    const __m512i second = _mm512_permutex2var_epi16(rounded[2], lower_words, rounded[3]);
    const __m512i low = _mm512_permutex2var_epi8(first, low_bytes, second);
    low_sum = _mm512_dpbusd_epi32(low_sum, ones, low);
    if constexpr (kPlanes == 1) {
      _mm512_store_si512(planes, low);
    } else {
      const __m512i half = _mm512_set1_epi16(128);
      const __m512i high =
          _mm512_permutex2var_epi8(_mm512_add_epi16(first, half), high_bytes, _mm512_add_epi16(second, half));
      high_sum = _mm512_dpbusd_epi32(high_sum, ones, high);
      _mm512_store_si512(planes, high);
      _mm512_store_si512(planes + plane_bytes, low);
    }
  }
  sums[0] = _mm512_reduce_add_epi32(kPlanes == 1 ? low_sum : high_sum);
  if constexpr (kPlanes == 2) sums[1] = _mm512_reduce_add_epi32(low_sum);
}

inline void store_sums(int32_t value, char* out) { _mm512_store_si512(out, _mm512_set1_epi32(value)); }

// 16 rows of one token: products of one plane, or of two.
template <int kPlanes>
inline void finish_rows(const int32_t* first, const int32_t* second, float unit, bool add, float* rows) {
  __m512i sum = _mm512_load_si512(first);
  if constexpr (kPlanes == 2) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_load_si512(second));
  __m512 result = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(unit));
  if (add) result = _mm512_add_ps(_mm512_loadu_ps(rows), result);
  _mm512_storeu_ps(rows, result);
}
