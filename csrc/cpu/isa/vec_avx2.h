// The 16-lane vector in two AVX registers. Include this where elementwise_body.h says.

struct Vec {
  __m256 low, high;  // lanes 0-7 and 8-15

  static Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Vec broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }

  // Each lane shifts its own bit into the sign position.
  static Vec signs(const char* half_word) {
    uint16_t bits;
    std::memcpy(&bits, half_word, 2);
    const __m256i all = _mm256_set1_epi32(bits);
    return {signs_of(all, _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24)),
            signs_of(all, _mm256_setr_epi32(23, 22, 21, 20, 19, 18, 17, 16))};
  }
  // A broadcast from memory serves both halves of a word.
  template <int kHalf>
  static Vec word_signs(const char* word) {
    int32_t bits;
    std::memcpy(&bits, word, 4);
    const __m256i all = _mm256_set1_epi32(bits);
    if constexpr (kHalf == 0)
      return {signs_of(all, _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24)),
              signs_of(all, _mm256_setr_epi32(23, 22, 21, 20, 19, 18, 17, 16))};
    return {signs_of(all, _mm256_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8)),
            signs_of(all, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0))};
  }
  static Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static Vec mul(const Vec& a, const Vec& b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  static Vec add(const Vec& a, const Vec& b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  static Vec div(const Vec& a, const Vec& b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
  }
  static Vec max(const Vec& a, const Vec& b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
  }
  static Vec min(const Vec& a, const Vec& b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
  }
  static Vec power_of_two(const Vec& n) { return {power_of_two(n.low), power_of_two(n.high)}; }

  static Vec fused(const Vec& a, const Vec& b, const Vec& c) { return fma(a, b, c); }

  static Vec load_half(const void* p) {
    const __m128i* halves = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
  static Vec load_bfloat(const void* p) {
    const __m128i* values = static_cast<const __m128i*>(p);
    return {widen_bfloat(_mm_loadu_si128(values)), widen_bfloat(_mm_loadu_si128(values + 1))};
  }
  static Vec load_int8(const void* p) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  void store_half(void* p) const {
    __m128i* halves = static_cast<__m128i*>(p);
    _mm_storeu_si128(halves, _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
  }
  void store_bfloat(void* p) const {
    const __m256i packed = _mm256_packus_epi32(round_bfloat(low), round_bfloat(high));
    // packus works within 128-bit halves; put the four quarters back in order.
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0)));
  }

  template <int kCount>
  static void reduce(const Vec* vectors, float* out) {
    static_assert(kCount % 2 == 0, "vectors are reduced in pairs");
    for (int i = 0; i < kCount; i += 2) {
      const __m128 a = fold(vectors[i]), b = fold(vectors[i + 1]);
      // a0+a2, a1+a3, b0+b2, b1+b3, then neighbors.
      const __m128 pairs = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
      const __m128 sums = _mm_add_ps(pairs, _mm_movehdup_ps(pairs));
      out[i] = _mm_cvtss_f32(sums);
      out[i + 1] = _mm_cvtss_f32(_mm_movehl_ps(sums, sums));
    }
  }

 private:
  // Adding 2^23 leaves the exponent's bits at the bottom.
  static __m256 power_of_two(__m256 n) {
    const __m256 biased = _mm256_add_ps(n, _mm256_set1_ps(0x1p23f + 127.0f));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased), 23));
  }
  static __m256 signs_of(__m256i bits, __m256i shifts) {
    const __m256 top = _mm256_castsi256_ps(_mm256_sllv_epi32(bits, shifts));
    return _mm256_or_ps(_mm256_and_ps(top, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
  }
  static __m256 widen_bfloat(__m128i values) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
  }
  // The upper 16 bits after rounding to nearest even; NaN is made quiet instead of being rounded to infinity.
  static __m256i round_bfloat(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  }
  static __m128 fold(const Vec& v) {
    const __m256 eight = _mm256_add_ps(v.low, v.high);
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  }
};
