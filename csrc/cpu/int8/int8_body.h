// The int8 products of kernels.h, written once over `Vec`. Include this after elementwise_body.h and the tile
// shape kInt8Tokens, where that file says.

constexpr int kInt8Rows = 4;
static_assert(kTileRows % kInt8Rows == 0, "a tile is whole groups of rows");

// Adds 16 columns to the sums of kInt8Rows rows and kTokens tokens.
template <int kTokens>
inline void int8_step(const char* const* row, int64_t row_column, const float* x, int64_t x_stride,
                      Vec* sums) {
  Vec values[kTokens];
  for (int t = 0; t < kTokens; ++t) values[t] = Vec::load(x + t * x_stride);
  for (int r = 0; r < kInt8Rows; ++r) {
    const Vec weight = Vec::load_int8(row[r] + row_column);
    for (int t = 0; t < kTokens; ++t)
      sums[t * kInt8Rows + r] = Vec::fused(weight, values[t], sums[t * kInt8Rows + r]);
  }
}

// Accumulates kTokens x kInt8Rows dot products over the columns [begin, end) and adds them to `out`.
template <int kTokens>
void int8_tile(const Int8Rows& rows, int64_t first, int64_t begin, int64_t end, const float* x,
               int64_t x_stride, float* out) {
  const char* row[kInt8Rows];
  for (int r = 0; r < kInt8Rows; ++r) {
    // Past the last row it is read again; the driver ignores those results.
    const int64_t index = first + r < rows.rows ? first + r : rows.rows - 1;
    row[r] = reinterpret_cast<const char*>(rows.values) + index * rows.stride;
  }
  Vec sums[kTokens * kInt8Rows];
  for (int i = 0; i < kTokens * kInt8Rows; ++i) sums[i] = Vec::zero();
  int64_t column = begin;
  for (; column + kLanes <= end; column += kLanes)
    int8_step<kTokens>(row, column, x + column, x_stride, sums);
  if (column < end) {
    char tail[kInt8Rows][kLanes] = {};
    const char* tails[kInt8Rows];
    for (int r = 0; r < kInt8Rows; ++r) {
      for (int64_t c = column; c < end; ++c) tail[r][c - column] = row[r][c];
      tails[r] = tail[r];
    }
    int8_step<kTokens>(tails, 0, x + column, x_stride, sums);
  }
  for (int t = 0; t < kTokens; ++t) {
    float reduced[kInt8Rows];
    Vec::reduce<kInt8Rows>(sums + t * kInt8Rows, reduced);
    for (int r = 0; r < kInt8Rows; ++r) out[t * kTileRows + first + r] += reduced[r];
  }
}

// Runs int8_tile for a number of tokens that is only known at run time, at most kTokens.
template <int kTokens>
void int8_tokens(const Int8Rows& rows, int64_t first, int64_t begin, int64_t end, const float* x,
                 int64_t x_stride, int64_t tokens, float* out) {
  if (tokens == kTokens) return int8_tile<kTokens>(rows, first, begin, end, x, x_stride, out);
  if constexpr (kTokens > 1) int8_tokens<kTokens - 1>(rows, first, begin, end, x, x_stride, tokens, out);
}

void int8_dots(const Int8Rows& rows, const float* x, int64_t x_stride, int64_t tokens, float* out) {
  for (int64_t i = 0; i < tokens * kTileRows; ++i) out[i] = 0.0f;
  for (int64_t begin = 0; begin < rows.cols; begin += kDotChunk) {
    const int64_t end = begin + kDotChunk < rows.cols ? begin + kDotChunk : rows.cols;
    // All tokens use the chunk of these rows while it is in L1.
    for (int64_t first = 0; first < rows.rows; first += kInt8Rows)
      for (int64_t t = 0; t < tokens; t += kInt8Tokens)
        int8_tokens<kInt8Tokens>(rows, first, begin, end, x + t * x_stride, x_stride,
                                 tokens - t < kInt8Tokens ? tokens - t : kInt8Tokens, out + t * kTileRows);
  }
}
