// The 16-lane vector in four NEON registers. Include this where elementwise_body.h says.

struct Vec {
  float32x4_t part[4];  // lanes 0-3, 4-7, 8-11 and 12-15

  static Vec zero() { return broadcast(0.0f); }
  static Vec load(const float* p) { return {{quad(p), quad(p + 4), quad(p + 8), quad(p + 12)}}; }
  static Vec broadcast(float value) {
    const float32x4_t all = vdupq_n_f32(value);
    return {{all, all, all, all}};
  }
  void store(float* p) const {
    for (int i = 0; i < 4; ++i)
      vst1q_u8(reinterpret_cast<uint8_t*>(p + 4 * i), vreinterpretq_u8_f32(part[i]));
  }

  // Each lane shifts its own bit into the sign position.
  static Vec signs(const char* half_word) {
    uint16_t bits;
    std::memcpy(&bits, half_word, 2);
    return signs_of<0>(vdupq_n_u32(bits));
  }
  // One broadcast serves both halves of a word.
  template <int kHalf>
  static Vec word_signs(const char* word) {
    uint32_t bits;
    std::memcpy(&bits, word, 4);
    return signs_of<16 * kHalf>(vdupq_n_u32(bits));
  }
  static Vec fma(const Vec& a, const Vec& b, const Vec& c) { return fused(a, b, c); }
  static Vec fused(const Vec& a, const Vec& b, const Vec& c) {
    return map([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
  }
  static Vec mul(const Vec& a, const Vec& b) {
    return map([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
  }
  static Vec add(const Vec& a, const Vec& b) {
    return map([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
  }
  static Vec div(const Vec& a, const Vec& b) {
    return map([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
  }
  // Comparisons, because the instructions for maxima make NaN of a NaN on either side.
  static Vec max(const Vec& a, const Vec& b) {
    return map([&](int i) { return vbslq_f32(vcgtq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]); });
  }
  static Vec min(const Vec& a, const Vec& b) {
    return map([&](int i) { return vbslq_f32(vcltq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]); });
  }
  // Adding 2^23 leaves the exponent's bits at the bottom.
  static Vec power_of_two(const Vec& n) {
    return map([&](int i) {
      const float32x4_t biased = vaddq_f32(n.part[i], vdupq_n_f32(0x1p23f + 127.0f));
      return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(biased), 23));
    });
  }

  static Vec load_half(const void* p) {
    return map([&](int i) {
      return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(static_cast<const uint8_t*>(p) + 8 * i)));
    });
  }
  static Vec load_bfloat(const void* p) {
    return map([&](int i) {
      const uint16x4_t values = vreinterpret_u16_u8(vld1_u8(static_cast<const uint8_t*>(p) + 8 * i));
      return vreinterpretq_f32_u32(vshll_n_u16(values, 16));
    });
  }
  static Vec load_int8(const void* p) {
    const int8x16_t bytes = vld1q_s8(static_cast<const int8_t*>(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
  }
  void store_half(void* p) const {
    for (int i = 0; i < 4; ++i)
      vst1_u8(static_cast<uint8_t*>(p) + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(part[i])));
  }
  void store_bfloat(void* p) const {
    for (int i = 0; i < 4; ++i)
      vst1_u8(static_cast<uint8_t*>(p) + 8 * i, vreinterpret_u8_u16(round_bfloat(part[i])));
  }

  template <int kCount>
  static void reduce(const Vec* vectors, float* out) {
    static_assert(kCount % 2 == 0, "vectors are reduced in pairs");
    for (int i = 0; i < kCount; i += 2) {
      const float32x2_t sums = vpadd_f32(fold(vectors[i]), fold(vectors[i + 1]));
      vst1_u8(reinterpret_cast<uint8_t*>(out + i), vreinterpret_u8_f32(sums));
    }
  }

 private:
  template <typename Make>
  static Vec map(const Make& make) {
    return {{make(0), make(1), make(2), make(3)}};
  }
  // At any address.
  static float32x4_t quad(const float* p) {
    return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p)));
  }
  template <int kFirst>
  static Vec signs_of(uint32x4_t bits) {
    return map([&](int i) {
      const int32_t top = 31 - kFirst - 4 * i;
      const int32_t shifts[4] = {top, top - 1, top - 2, top - 3};
      const uint32x4_t shifted = vshlq_u32(bits, vld1q_s32(shifts));
      return vreinterpretq_f32_u32(
          vbslq_u32(vdupq_n_u32(0x80000000u), shifted, vreinterpretq_u32_f32(vdupq_n_f32(1.0f))));
    });
  }
  // The upper 16 bits after rounding to nearest even; NaN is made quiet instead of being rounded to infinity.
  static uint16x4_t round_bfloat(float32x4_t value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16);
  }
  // Lanes i + (i + 8), then + 4, then + 2.
  static float32x2_t fold(const Vec& v) {
    const float32x4_t four = vaddq_f32(vaddq_f32(v.part[0], v.part[2]), vaddq_f32(v.part[1], v.part[3]));
    return vadd_f32(vget_low_f32(four), vget_high_f32(four));
  }
};
