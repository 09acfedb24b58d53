// The primitives of kernels.h, written once over a 16-lane vector type `Vec` that each ISA file defines.
//
// Include this after defining, inside an unnamed namespace in lb2::cpu, a struct Vec with
//   static Vec zero();  static Vec load(const float*);  static Vec broadcast(float);  void store(float*)
//   const; static Vec signs(const char* halfword);              // +-1 from 16 packed signs, bit 1 is -1
//   static Vec fma(Vec a, Vec b, Vec c);                 // a * b + c, where a is +-1 or the product is exact
//   static Vec mul(Vec, Vec);  static Vec add(Vec, Vec);
//   static Vec load_half(const void*), load_bfloat(const void*);  void store_half(void*), store_bfloat(void*)
//   const; template <int kCount> static void reduce(const Vec*, float*);  // tree sums of kCount vectors
// and the tile shapes kDotRows1, kDotRows, kDotTokens, kSumVecs, kSumTokens. Everything here must stay inside
// the unnamed namespace: an inline function shared between files of different ISA flags could be linked into
// the wrong one and crash older CPUs.

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "half-words are addressed in little-endian order");

// Bytes of the 16-column half-word `h` of a row.
inline const char* half_word(const int32_t* words, int64_t h) {
  return reinterpret_cast<const char*>(words) + 2 * h;
}

// Accumulates kTokens x kRows dot products over the half-words [begin, end) and adds them to `out`.
template <int kRows, int kTokens>
void dots_tile(const SignRows& rows, int64_t first, int64_t begin, int64_t end, const float* x,
               int64_t x_stride, float* out) {
  const char* row[kRows];
  for (int r = 0; r < kRows; ++r) {
    // Past the last row its words are read again; the driver ignores those results.
    const int64_t index = first + r < rows.rows ? first + r : rows.rows - 1;
    row[r] = half_word(rows.words, 0) + index * rows.stride * 4;
  }
  Vec sums[kTokens * kRows];
  for (int i = 0; i < kTokens * kRows; ++i) sums[i] = Vec::zero();
  for (int64_t h = begin; h < end; ++h) {
    Vec values[kTokens];
    for (int t = 0; t < kTokens; ++t) values[t] = Vec::load(x + t * x_stride + h * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec sign = Vec::signs(row[r] + 2 * h);
      for (int t = 0; t < kTokens; ++t) sums[t * kRows + r] = Vec::fma(sign, values[t], sums[t * kRows + r]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float reduced[kRows];
    Vec::reduce<kRows>(sums + t * kRows, reduced);
    for (int r = 0; r < kRows; ++r) out[t * kTileRows + first + r] += reduced[r];
  }
}

// All rows of the tile for kTokens tokens; the x tile stays in L1 while the rows pass over it.
template <int kRows, int kTokens>
void dots_rows(const SignRows& rows, int64_t begin, int64_t end, const float* x, int64_t x_stride,
               float* out) {
  for (int64_t first = 0; first < rows.rows; first += kRows)
    dots_tile<kRows, kTokens>(rows, first, begin, end, x, x_stride, out);
}

// Runs dots_rows for a number of tokens that is only known at run time, at most kTokens.
template <int kTokens>
void dots_remainder(const SignRows& rows, int64_t begin, int64_t end, const float* x, int64_t x_stride,
                    int64_t tokens, float* out) {
  if (tokens == kTokens)
    return kTokens == 1 ? dots_rows<kDotRows1, 1>(rows, begin, end, x, x_stride, out)
                        : dots_rows<kDotRows, kTokens>(rows, begin, end, x, x_stride, out);
  if constexpr (kTokens > 1) dots_remainder<kTokens - 1>(rows, begin, end, x, x_stride, tokens, out);
}

void sign_dots(const SignRows& rows, const float* x, int64_t x_stride, int64_t tokens, float* out) {
  for (int64_t i = 0; i < tokens * kTileRows; ++i) out[i] = 0.0f;
  const int64_t half_words = rows.words_per_row * 2;
  constexpr int64_t kStep = kDotChunk / kLanes;
  for (int64_t begin = 0; begin < half_words; begin += kStep) {
    const int64_t end = begin + kStep < half_words ? begin + kStep : half_words;
    for (int64_t t = 0; t < tokens; t += kDotTokens)
      dots_remainder<kDotTokens>(rows, begin, end, x + t * x_stride, x_stride,
                                 tokens - t < kDotTokens ? tokens - t : kDotTokens, out + t * kTileRows);
  }
}

// Accumulates kTokens x (kSumVecs * 16) column sums over rows [begin, end) and adds them to `out`.
template <int kTokens>
void sums_tile(const SignRows& rows, int64_t half, int64_t begin, int64_t end, const float* x,
               int64_t x_stride, float* out) {
  Vec sums[kTokens * kSumVecs];
  for (int i = 0; i < kTokens * kSumVecs; ++i) sums[i] = Vec::zero();
  const char* row = half_word(rows.words, half) + begin * rows.stride * 4;
  for (int64_t r = begin; r < end; ++r, row += rows.stride * 4) {
    Vec values[kTokens];
    for (int t = 0; t < kTokens; ++t) values[t] = Vec::broadcast(x[t * x_stride + r]);
    for (int v = 0; v < kSumVecs; ++v) {
      const Vec sign = Vec::signs(row + 2 * v);
      for (int t = 0; t < kTokens; ++t)
        sums[t * kSumVecs + v] = Vec::fma(sign, values[t], sums[t * kSumVecs + v]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kSumVecs; ++v) {
      float* target = out + t * kTileCols + v * kLanes;
      Vec::add(Vec::load(target), sums[t * kSumVecs + v]).store(target);
    }
}

template <int kTokens>
void sums_remainder(const SignRows& rows, int64_t half, int64_t begin, int64_t end, const float* x,
                    int64_t x_stride, int64_t tokens, float* out) {
  if (tokens == kTokens) return sums_tile<kTokens>(rows, half, begin, end, x, x_stride, out);
  if constexpr (kTokens > 1) sums_remainder<kTokens - 1>(rows, half, begin, end, x, x_stride, tokens, out);
}

void sign_sums(const SignRows& rows, const float* x, int64_t x_stride, int64_t tokens, float* out) {
  static_assert(kTileCols % (kSumVecs * kLanes) == 0 && 2 % kSumVecs == 0,
                "a step must not run past a row's words");
  for (int64_t i = 0; i < tokens * kTileCols; ++i) out[i] = 0.0f;
  const int64_t halves =
      rows.words_per_row * 2 < kTileCols / kLanes ? rows.words_per_row * 2 : kTileCols / kLanes;
  for (int64_t begin = 0; begin < rows.rows; begin += kSumChunk) {
    const int64_t end = begin + kSumChunk < rows.rows ? begin + kSumChunk : rows.rows;
    for (int64_t t = 0; t < tokens; t += kSumTokens)
      for (int64_t half = 0; half < halves; half += kSumVecs)
        sums_remainder<kSumTokens>(rows, half, begin, end, x + t * x_stride, x_stride,
                                   tokens - t < kSumTokens ? tokens - t : kSumTokens,
                                   out + t * kTileCols + half * kLanes);
  }
}

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
