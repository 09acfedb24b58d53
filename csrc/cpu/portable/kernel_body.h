// The sign products of kernels.h on the portable layout, written once over `Vec`. Include this after
// vec_<isa>.h and the tile shapes kDotRows1, kDotRows, kDotTokens, kSumTokens, where elementwise_body.h says.

constexpr int kWordVecs = LB2_WORD_BITS / kLanes;
static_assert(kWordVecs == 2, "a word is a low and a high half");

inline const char* word_at(const int32_t* words, int64_t index) {
  return reinterpret_cast<const char*>(words) + index * 4;
}

// Adds half a word of columns to the sums of kRows rows and one token.
template <int kHalf, int kRows>
inline void dots_word(const char* const* row, int64_t word, const float* x, Vec* sums) {
  const Vec value = Vec::load(x + word * LB2_WORD_BITS + kHalf * kLanes);
  for (int r = 0; r < kRows; ++r)
    sums[r] = Vec::fma(Vec::template word_signs<kHalf>(row[r] + word * 4), value, sums[r]);
}

// Likewise for several tokens, whose sums leave fewer registers: one half-word at a time.
template <int kRows, int kTokens>
inline void dots_half(const char* const* row, int64_t half, const float* x, int64_t x_stride, Vec* sums) {
  Vec values[kTokens];
  for (int t = 0; t < kTokens; ++t) values[t] = Vec::load(x + t * x_stride + half * kLanes);
  for (int r = 0; r < kRows; ++r) {
    const Vec sign = Vec::signs(row[r] + half * 2);
    for (int t = 0; t < kTokens; ++t) sums[t * kRows + r] = Vec::fma(sign, values[t], sums[t * kRows + r]);
  }
}

// Accumulates kTokens x kRows dot products over the words [begin, end) and adds them to `out`.
template <int kRows, int kTokens>
void dots_tile(const SignRows& rows, int64_t first, int64_t begin, int64_t end, const float* x,
               int64_t x_stride, float* out) {
  const char* row[kRows];
  for (int r = 0; r < kRows; ++r) {
    // Past the last row its words are read again; the driver ignores those results.
    const int64_t index = first + r < rows.rows ? first + r : rows.rows - 1;
    row[r] = word_at(rows.words, index * rows.stride);
  }
  Vec sums[kTokens * kRows];
  for (int i = 0; i < kTokens * kRows; ++i) sums[i] = Vec::zero();
  if constexpr (kTokens == 1) {
    for (int64_t word = begin; word < end; ++word) {
      dots_word<0, kRows>(row, word, x, sums);
      dots_word<1, kRows>(row, word, x, sums);
    }
  } else {
    for (int64_t half = 2 * begin; half < 2 * end; ++half)
      dots_half<kRows, kTokens>(row, half, x, x_stride, sums);
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
  constexpr int64_t kStep = kDotChunk / LB2_WORD_BITS;
  for (int64_t begin = 0; begin < rows.words_per_row; begin += kStep) {
    const int64_t end = begin + kStep < rows.words_per_row ? begin + kStep : rows.words_per_row;
    for (int64_t t = 0; t < tokens; t += kDotTokens)
      dots_remainder<kDotTokens>(rows, begin, end, x + t * x_stride, x_stride,
                                 tokens - t < kDotTokens ? tokens - t : kDotTokens, out + t * kTileRows);
  }
}

// Accumulates kTokens x 32 column sums of word `word` over rows [begin, end) and adds them to `out`.
template <int kTokens>
void sums_tile(const SignRows& rows, int64_t word, int64_t begin, int64_t end, const float* x,
               int64_t x_stride, float* out) {
  Vec sums[kTokens * kWordVecs];
  for (int i = 0; i < kTokens * kWordVecs; ++i) sums[i] = Vec::zero();
  for (int64_t r = begin; r < end; ++r) {
    const char* packed = word_at(rows.words, r * rows.stride + word);
    const Vec signs[kWordVecs] = {Vec::template word_signs<0>(packed), Vec::template word_signs<1>(packed)};
    for (int t = 0; t < kTokens; ++t) {
      const Vec value = Vec::broadcast(x[t * x_stride + r]);
      for (int v = 0; v < kWordVecs; ++v)
        sums[t * kWordVecs + v] = Vec::fma(signs[v], value, sums[t * kWordVecs + v]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int v = 0; v < kWordVecs; ++v) {
      float* target = out + t * kTileCols + v * kLanes;
      Vec::add(Vec::load(target), sums[t * kWordVecs + v]).store(target);
    }
}

template <int kTokens>
void sums_remainder(const SignRows& rows, int64_t word, int64_t begin, int64_t end, const float* x,
                    int64_t x_stride, int64_t tokens, float* out) {
  if (tokens == kTokens) return sums_tile<kTokens>(rows, word, begin, end, x, x_stride, out);
  if constexpr (kTokens > 1) sums_remainder<kTokens - 1>(rows, word, begin, end, x, x_stride, tokens, out);
}

void sign_sums(const SignRows& rows, const float* x, int64_t x_stride, int64_t tokens, float* out) {
  constexpr int64_t kTileWords = kTileCols / LB2_WORD_BITS;
  for (int64_t i = 0; i < tokens * kTileCols; ++i) out[i] = 0.0f;
  const int64_t words = rows.words_per_row < kTileWords ? rows.words_per_row : kTileWords;
  for (int64_t begin = 0; begin < rows.rows; begin += kSumChunk) {
    const int64_t end = begin + kSumChunk < rows.rows ? begin + kSumChunk : rows.rows;
    for (int64_t t = 0; t < tokens; t += kSumTokens)
      for (int64_t word = 0; word < words; ++word)
        sums_remainder<kSumTokens>(rows, word, begin, end, x + t * x_stride, x_stride,
                                   tokens - t < kSumTokens ? tokens - t : kSumTokens,
                                   out + t * kTileCols + word * LB2_WORD_BITS);
  }
}
