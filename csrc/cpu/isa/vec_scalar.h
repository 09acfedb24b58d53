// The 16-lane vector in plain C++. Include this where elementwise_body.h says.

// +-1 for each of 8 packed signs.
struct SignTable {
  float values[256][8];
  constexpr SignTable() : values() {
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0; i < 8; ++i) values[byte][i] = (byte >> i) & 1 ? -1.0f : 1.0f;
  }
};
constexpr SignTable kSigns;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// IEEE binary16 -> binary32, exact for every input.
float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1Fu, mantissa = half & 0x3FFu;
  if (exponent == 0x1F) return float_of(sign | 0x7F800000u | (mantissa << 13));
  if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return float_of(sign | bits_of(magnitude));
}

// binary32 -> binary16, to nearest, ties to even; overflow becomes infinity, NaN keeps what fits of its
// payload.
uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7F800000u)  // NaN: quiet, with the upper bits of its payload, as hardware does
    return static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Below the smallest normal half: adding 0.5 leaves the rounded multiple of 2^-24 in the mantissa.
    return sign | static_cast<uint16_t>(bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u);
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

struct Vec {
  float lane[kLanes];

  static Vec zero() { return {}; }
  static Vec load(const float* p) {
    Vec v;
    std::memcpy(v.lane, p, sizeof v.lane);
    return v;
  }
  static Vec broadcast(float value) {
    Vec v;
    for (float& lane : v.lane) lane = value;
    return v;
  }
  void store(float* p) const { std::memcpy(p, lane, sizeof lane); }

  static Vec signs(const char* half_word) {
    Vec v;
    std::memcpy(v.lane, kSigns.values[static_cast<uint8_t>(half_word[0])], 32);
    std::memcpy(v.lane + 8, kSigns.values[static_cast<uint8_t>(half_word[1])], 32);
    return v;
  }
  template <int kHalf>
  static Vec word_signs(const char* word) {
    return signs(word + 2 * kHalf);
  }
  static Vec add(const Vec& a, const Vec& b) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] + b.lane[i];
    return v;
  }
  static Vec mul(const Vec& a, const Vec& b) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] * b.lane[i];
    return v;
  }
  static Vec div(const Vec& a, const Vec& b) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] / b.lane[i];
    return v;
  }
  static Vec max(const Vec& a, const Vec& b) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return v;
  }
  static Vec min(const Vec& a, const Vec& b) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return v;
  }
  // Adding 2^23 leaves the exponent's bits at the bottom.
  static Vec power_of_two(const Vec& n) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = float_of(bits_of(n.lane[i] + (0x1p23f + 127.0f)) << 23);
    return v;
  }
  static Vec fma(const Vec& a, const Vec& b, const Vec& c) { return add(mul(a, b), c); }

  static Vec fused(const Vec& a, const Vec& b, const Vec& c) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
    return v;
  }

  static Vec load_half(const void* p) {
    uint16_t halves[kLanes];
    std::memcpy(halves, p, sizeof halves);
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = half_to_float(halves[i]);
    return v;
  }
  static Vec load_bfloat(const void* p) {
    uint16_t values[kLanes];
    std::memcpy(values, p, sizeof values);
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = float_of(static_cast<uint32_t>(values[i]) << 16);
    return v;
  }
  static Vec load_int8(const void* p) {
    int8_t values[kLanes];
    std::memcpy(values, p, sizeof values);
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = static_cast<float>(values[i]);
    return v;
  }
  void store_half(void* p) const {
    uint16_t halves[kLanes];
    for (int i = 0; i < kLanes; ++i) halves[i] = float_to_half(lane[i]);
    std::memcpy(p, halves, sizeof halves);
  }
  void store_bfloat(void* p) const {
    uint16_t values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = float_to_bfloat(lane[i]);
    std::memcpy(p, values, sizeof values);
  }

  template <int kCount>
  static void reduce(const Vec* vectors, float* out) {
    for (int v = 0; v < kCount; ++v) {
      float sums[kLanes];
      std::memcpy(sums, vectors[v].lane, sizeof sums);
      for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
      out[v] = sums[0];
    }
  }
};
