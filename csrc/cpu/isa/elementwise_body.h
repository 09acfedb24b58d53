// clang-format off: the layout of this comment is meant
// Element-wise primitives, written once over a 16-lane vector type `Vec`: vec_<isa>.h defines it with
//   static Vec zero(), load(const float*), broadcast(float);  void store(float*) const;
//   static Vec signs(const char* half_word);                       // +-1 from 16 packed signs, bit 1 is -1
//   template <int kHalf> static Vec word_signs(const char* word);  // the same of the low or high half of a word
//   static Vec fma(Vec a, Vec b, Vec c);                           // a * b + c; a is +-1, so the product is exact
//   static Vec fused(Vec a, Vec b, Vec c);                         // a * b + c, rounded once
//   static Vec mul(Vec, Vec), add(Vec, Vec), div(Vec, Vec);
//   static Vec max(Vec a, Vec b), min(Vec a, Vec b);               // b if one is NaN
//   static Vec power_of_two(Vec n);                                // 2^n; n is an integer from -126 to 127, or NaN
//   static Vec load_half(const void*), load_bfloat(const void*);
//   static Vec load_int8(const void*);
//   void store_half(void*) const, store_bfloat(void*) const;
//   template <int kCount> static void reduce(const Vec*, float*);  // tree sums of kCount vectors
//
// This, vec_<isa>.h and the other *_body.h files are included by kernels_<isa>.cpp inside an unnamed namespace in
// lb2::cpu, and must stay there: an inline function shared between files of different ISA flags could be linked into
// the wrong one and crash older CPUs.
// clang-format on

using LoadVec = Vec (*)(const void*);

template <LoadVec kLoad, int kBytes>
void load_scaled_as(const void* in, const float* scale, int64_t n, int64_t padded, float* out) {
  const char* bytes = static_cast<const char*>(in);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    Vec::mul(kLoad(bytes + i * kBytes), Vec::load(scale + i)).store(out + i);
  if (i < n) {
    char tail[kLanes * kBytes] = {};
    float tail_scale[kLanes] = {};
    for (int64_t b = 0; b < (n - i) * kBytes; ++b) tail[b] = bytes[i * kBytes + b];
    const char* scale_bytes = reinterpret_cast<const char*>(scale + i);
    for (int64_t b = 0; b < (n - i) * 4; ++b) reinterpret_cast<char*>(tail_scale)[b] = scale_bytes[b];
    Vec::mul(kLoad(tail), Vec::load(tail_scale)).store(out + i);
    i += kLanes;
  }
  for (; i < padded; i += kLanes) Vec::zero().store(out + i);
}

inline Vec load_float(const void* p) { return Vec::load(static_cast<const float*>(p)); }
inline Vec load_half(const void* p) { return Vec::load_half(p); }
inline Vec load_bfloat(const void* p) { return Vec::load_bfloat(p); }

void load_scaled(lb2_dtype dtype, const void* in, const float* scale, int64_t n, int64_t padded, float* out) {
  if (dtype == LB2_FLOAT32) return load_scaled_as<load_float, 4>(in, scale, n, padded, out);
  if (dtype == LB2_FLOAT16) return load_scaled_as<load_half, 2>(in, scale, n, padded, out);
  return load_scaled_as<load_bfloat, 2>(in, scale, n, padded, out);
}

template <LoadVec kLoad, int kBytes>
void load_padded_as(const void* in, int64_t n, int64_t padded, float* out) {
  const char* bytes = static_cast<const char*>(in);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) kLoad(bytes + i * kBytes).store(out + i);
  if (i < n) {
    char tail[kLanes * kBytes] = {};
    for (int64_t b = 0; b < (n - i) * kBytes; ++b) tail[b] = bytes[i * kBytes + b];
    kLoad(tail).store(out + i);
    i += kLanes;
  }
  for (; i < padded; i += kLanes) Vec::zero().store(out + i);
}

void load_padded(lb2_dtype dtype, const void* in, int64_t n, int64_t padded, float* out) {
  if (dtype == LB2_FLOAT32) return load_padded_as<load_float, 4>(in, n, padded, out);
  if (dtype == LB2_FLOAT16) return load_padded_as<load_half, 2>(in, n, padded, out);
  return load_padded_as<load_bfloat, 2>(in, n, padded, out);
}

inline void store_vec(lb2_dtype dtype, const Vec& value, void* out) {
  if (dtype == LB2_FLOAT32) return value.store(static_cast<float*>(out));
  if (dtype == LB2_FLOAT16) return value.store_half(out);
  return value.store_bfloat(out);
}

void store(lb2_dtype dtype, const float* in, int64_t n, void* out) {
  const int64_t bytes = dtype == LB2_FLOAT32 ? 4 : 2;
  char* target = static_cast<char*>(out);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_vec(dtype, Vec::load(in + i), target + i * bytes);
  if (i == n) return;
  float tail[kLanes] = {};
  for (int64_t j = i; j < n; ++j) tail[j - i] = in[j];
  char stored[kLanes * 4];
  store_vec(dtype, Vec::load(tail), stored);
  for (int64_t b = 0; b < (n - i) * bytes; ++b) target[i * bytes + b] = stored[b];
}

void load_latents(const float* parts, int64_t part_stride, int64_t num_parts, const float* scale, int64_t n,
                  int64_t padded, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec sum = Vec::load(parts + i);
    for (int64_t p = 1; p < num_parts; ++p) sum = Vec::add(sum, Vec::load(parts + p * part_stride + i));
    Vec::mul(sum, Vec::load(scale + i)).store(out + i);
  }
  for (; i < n; ++i) {
    float sum = parts[i], factor;
    for (int64_t p = 1; p < num_parts; ++p) sum += parts[p * part_stride + i];
    std::memcpy(&factor, reinterpret_cast<const char*>(scale) + i * 4, 4);
    out[i] = sum * factor;
  }
  for (; i < padded; ++i) out[i] = 0.0f;
}

#include "cpu/isa/tree_body.h"

float abs_sum(const float* z, int64_t padded) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += __builtin_fabsf(z[i + l]);
  return tree_sum(lanes);
}

void scale_rows(const float* dots, const float* scale, float factor, int64_t n, bool add, float* sums) {
  const char* bytes = reinterpret_cast<const char*>(scale);
  const Vec factors = Vec::broadcast(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec term = Vec::mul(Vec::mul(Vec::load(dots + i), factors), Vec::load(scale + i));
    (add ? Vec::add(Vec::load(sums + i), term) : term).store(sums + i);
  }
  for (; i < n; ++i) {
    float value;
    std::memcpy(&value, bytes + i * 4, 4);
    const float term = dots[i] * factor * value;
    sums[i] = add ? sums[i] + term : term;
  }
}

void add_bias(const float* bias, int64_t n, float* sums) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Vec::add(Vec::load(sums + i), Vec::load(bias + i)).store(sums + i);
  for (; i < n; ++i) {
    float value;
    std::memcpy(&value, reinterpret_cast<const char*>(bias) + i * 4, 4);
    sums[i] += value;
  }
}
