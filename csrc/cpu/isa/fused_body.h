// What surrounds the layers of a call: normalization, activation functions, residual sums. Include this after
// exponential_body.h, where elementwise_body.h says.

// The first `n` of 16 lanes, and zeros.
template <LoadVec kLoad, int kBytes>
inline Vec load_some(const char* in, int64_t n) {
  if (n >= kLanes) return kLoad(in);
  char lanes[kLanes * kBytes] = {};
  for (int64_t b = 0; b < n * kBytes; ++b) lanes[b] = in[b];
  return kLoad(lanes);
}

template <LoadVec kLoad, int kBytes>
float sum_squares_as(const char* in, int64_t n) {
  Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  const auto add = [&](int v, int64_t i) {
    const Vec x = load_some<kLoad, kBytes>(in + i * kBytes, n - i);
    sums[v] = Vec::add(sums[v], Vec::mul(x, x));
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int v = 0; v < 4; ++v) add(v, i + v * kLanes);
  for (int v = 0; i < n; i += kLanes) add(v++, i);
  float lanes[kLanes];
  Vec::add(Vec::add(sums[0], sums[1]), Vec::add(sums[2], sums[3])).store(lanes);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

float sum_squares(lb2_dtype dtype, const void* in, int64_t n) {
  const char* bytes = static_cast<const char*>(in);
  if (dtype == LB2_FLOAT32) return sum_squares_as<load_float, 4>(bytes, n);
  if (dtype == LB2_FLOAT16) return sum_squares_as<load_half, 2>(bytes, n);
  return sum_squares_as<load_bfloat, 2>(bytes, n);
}

template <LoadVec kLoad, int kBytes>
void scale_norm_as(const char* weight, float offset, float factor, int64_t n, float* out) {
  const Vec offsets = Vec::broadcast(offset), factors = Vec::broadcast(factor);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec scale = Vec::add(load_some<kLoad, kBytes>(weight + i * kBytes, n - i), offsets);
    Vec::mul(Vec::load(out + i), Vec::mul(factors, scale)).store(out + i);
  }
}

void scale_norm(lb2_dtype dtype, const void* weight, float offset, float factor, int64_t n, float* out) {
  const char* bytes = static_cast<const char*>(weight);
  if (dtype == LB2_FLOAT32) return scale_norm_as<load_float, 4>(bytes, offset, factor, n, out);
  if (dtype == LB2_FLOAT16) return scale_norm_as<load_half, 2>(bytes, offset, factor, n, out);
  return scale_norm_as<load_bfloat, 2>(bytes, offset, factor, n, out);
}

template <LoadVec kLoad, int kBytes>
void add_residual_as(const char* residual, int64_t n, float* sums) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    Vec::add(Vec::load(sums + i), kLoad(residual + i * kBytes)).store(sums + i);
  if (i == n) return;
  float lanes[kLanes];
  load_some<kLoad, kBytes>(residual + i * kBytes, n - i).store(lanes);
  for (int64_t j = i; j < n; ++j) sums[j] += lanes[j - i];
}

void add_residual(lb2_dtype dtype, const void* residual, int64_t n, float* sums) {
  const char* bytes = static_cast<const char*>(residual);
  if (dtype == LB2_FLOAT32) return add_residual_as<load_float, 4>(bytes, n, sums);
  if (dtype == LB2_FLOAT16) return add_residual_as<load_half, 2>(bytes, n, sums);
  return add_residual_as<load_bfloat, 2>(bytes, n, sums);
}

// x / (1 + exp(-y)).
inline Vec gated(const Vec& x, const Vec& y) {
  const Vec one = Vec::broadcast(1.0f);
  return Vec::div(x, Vec::add(one, exponential(Vec::mul(y, Vec::broadcast(-1.0f)))));
}

struct Silu {
  static Vec of(const Vec& x) { return gated(x, x); }
};

// x / 2 * (1 + tanh(u)) is x / (1 + exp(-2 u)).
struct GeluTanh {
  static Vec of(const Vec& x) {
    const Vec inner =
        Vec::fused(Vec::mul(x, x), Vec::broadcast(0x1.2444f2p-4f), Vec::broadcast(0x1.988454p+0f));
    return gated(x, Vec::mul(x, inner));
  }
};

// x * Phi(x) = max(x, 0) - |x| / 2 * erfc(t) with t = |x| / sqrt(2), and erfc(t) = exp(-t^2) T p(T) with
// T = 1 / (1 + t / 2): p is a polynomial of least relative error (about 1e-7) for t <= 10, where exp(-t^2) is
// subnormal. Small results keep their relative precision, which 1 + erf(x) does not.
struct Gelu {
  static Vec of(const Vec& x) {
    // The operand that may be NaN comes last.
    const Vec magnitude = Vec::max(Vec::mul(x, Vec::broadcast(-1.0f)), x);
    const Vec one = Vec::broadcast(1.0f);
    const Vec inverse = Vec::div(one, Vec::fused(magnitude, Vec::broadcast(0x1.6a09e6p-2f), one));
    Vec p = Vec::broadcast(-0x1.e3e52p-5f);
    for (const float coefficient : {0x1.2367fp-2f, -0x1.f2e528p-2f, 0x1.1cbe54p-2f, -0x1.b4435ap-6f,
                                    0x1.9f1aa8p-3f, 0x1.f1e04cp-3f, 0x1.2127p-2f, 0x1.20db42p-2f})
      p = Vec::fused(p, inverse, Vec::broadcast(coefficient));
    const Vec tail = Vec::mul(exponential(Vec::mul(Vec::mul(x, Vec::broadcast(-0.5f)), x)),
                              Vec::mul(Vec::mul(inverse, p), Vec::mul(magnitude, Vec::broadcast(-0.5f))));
    return Vec::add(Vec::max(Vec::zero(), x), tail);
  }
};

struct Relu {
  static Vec of(const Vec& x) { return Vec::max(Vec::zero(), x); }
};

template <typename Function>
void activate_as(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec value = Function::of(Vec::load(gate + i));
    (up == nullptr ? value : Vec::mul(value, Vec::load(up + i))).store(out + i);
  }
}

void activate(lb2_function function, const float* gate, const float* up, int64_t n, float* out) {
  if (function == LB2_FUNCTION_SILU) return activate_as<Silu>(gate, up, n, out);
  if (function == LB2_FUNCTION_GELU) return activate_as<Gelu>(gate, up, n, out);
  if (function == LB2_FUNCTION_GELU_TANH) return activate_as<GeluTanh>(gate, up, n, out);
  return activate_as<Relu>(gate, up, n, out);
}
