// The 16-lane vector in one AVX-512 register. Include this where elementwise_body.h says.

struct Vec {
  __m512 lanes;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
  void store(float* p) const { _mm512_storeu_ps(p, lanes); }

  static Vec signs(const char* half_word) {
    uint16_t bits;
    std::memcpy(&bits, half_word, 2);
    return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f))};
  }
  // Without mask registers, whose loads limit the single-token kernel: a broadcast from memory, and each lane
  // shifts its own bit into the sign position.
  template <int kHalf>
  static Vec word_signs(const char* word) {
    int32_t bits;
    std::memcpy(&bits, word, 4);
    const __m512i low = _mm512_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16);
    const __m512i shifts = _mm512_sub_epi32(low, _mm512_set1_epi32(16 * kHalf));
    const __m512i top = _mm512_sllv_epi32(_mm512_set1_epi32(bits), shifts);
    const __m512i sign_bit = _mm512_set1_epi32(INT32_MIN), one = _mm512_castps_si512(_mm512_set1_ps(1.0f));
    return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(top, sign_bit, one, 0xEA))};  // (top & sign) | 1.0
  }
  static Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)};
  }
  static Vec mul(const Vec& a, const Vec& b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
  static Vec add(const Vec& a, const Vec& b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
  static Vec div(const Vec& a, const Vec& b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }
  static Vec max(const Vec& a, const Vec& b) { return {_mm512_max_ps(a.lanes, b.lanes)}; }
  static Vec min(const Vec& a, const Vec& b) { return {_mm512_min_ps(a.lanes, b.lanes)}; }
  // Adding 2^23 leaves the exponent's bits at the bottom.
  static Vec power_of_two(const Vec& n) {
    const __m512 biased = _mm512_add_ps(n.lanes, _mm512_set1_ps(0x1p23f + 127.0f));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(biased), 23))};
  }

  static Vec fused(const Vec& a, const Vec& b, const Vec& c) { return fma(a, b, c); }

  static Vec load_half(const void* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
  }
  static Vec load_bfloat(const void* p) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
  }
  static Vec load_int8(const void* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))))};
  }
  void store_half(void* p) const {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
  }
  void store_bfloat(void* p) const {
    // Integer rounding, not VCVTNEPS2BF16: that one flushes subnormals, and not every AVX-512 CPU has it.
    const __m512i bits = _mm512_castps_si512(lanes);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
  }

  template <int kCount>
  static void reduce(const Vec* v, float* out) {
    static_assert(kCount == 4 || kCount == 8 || kCount == 16, "vectors are reduced four at a time");
    if constexpr (kCount == 16) {
      // Register q ends with vectors q, 4+q, 8+q, 12+q in its quarters, so that the transpose restores order.
      const __m512 sums = transpose_add(fold4(v[0], v[4], v[8], v[12]), fold4(v[1], v[5], v[9], v[13]),
                                        fold4(v[2], v[6], v[10], v[14]), fold4(v[3], v[7], v[11], v[15]));
      _mm512_storeu_ps(out, sums);
    } else {
      for (int i = 0; i < kCount; i += 4) {
        const __m512 four = fold4(v[i], v[i + 1], v[i + 2], v[i + 3]);
        const __m512 pairs =
            _mm512_add_ps(four, _mm512_permute_ps(four, 0x4E));  // lanes 0+2, 1+3 of each quarter
        const __m512 sums = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xB1));
        const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm_storeu_ps(out + i, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, sums)));
      }
    }
  }

 private:
  // Lanes i + (i + 8), then i + (i + 4), of four vectors: quarter j of the result belongs to argument j.
  static __m512 fold4(const Vec& a, const Vec& b, const Vec& c, const Vec& d) {
    const __m512 ab = fold_halves(a.lanes, b.lanes), cd = fold_halves(c.lanes, d.lanes);
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  }
  static __m512 fold_halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  }
  // Within each quarter: lane q becomes (x[0] + x[2]) + (x[1] + x[3]) of register q.
  static __m512 transpose_add(__m512 q0, __m512 q1, __m512 q2, __m512 q3) {
    const __m512 low01 = _mm512_unpacklo_ps(q0, q1), high01 = _mm512_unpackhi_ps(q0, q1);
    const __m512 low23 = _mm512_unpacklo_ps(q2, q3), high23 = _mm512_unpackhi_ps(q2, q3);
    const __m512 lane0 = _mm512_shuffle_ps(low01, low23, 0x44), lane1 = _mm512_shuffle_ps(low01, low23, 0xEE);
    const __m512 lane2 = _mm512_shuffle_ps(high01, high23, 0x44),
                 lane3 = _mm512_shuffle_ps(high01, high23, 0xEE);
    return _mm512_add_ps(_mm512_add_ps(lane0, lane2), _mm512_add_ps(lane1, lane3));
  }
};
