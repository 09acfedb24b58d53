// The attention primitives of attention/kernels.h, written once over `Vec`. Include this after
// exponential_body.h and the tile shapes kScoreRows, kScoreKeys1, kScoreKeys and kValueVecs, where
// elementwise_body.h says.

// The last `size` elements of a row, fewer than kLanes, and zeros.
template <LoadVec kLoad, int kBytes>
inline Vec load_part(const char* row, int64_t size) {
  char part[kLanes * kBytes] = {};
  std::memcpy(part, row, static_cast<size_t>(size * kBytes));
  return kLoad(part);
}

// Asks for the cache lines of a row. The kernels wait for memory if only the hardware looks ahead: they read
// the rows of several keys side by side, and values in columns.
inline void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

// Scores of kRows rows and kKeys keys from `first` on; keys past the last one repeat it.
template <LoadVec kLoad, int kBytes, int kRows, int kKeys>
inline void score_tile(const AttentionPiece& piece, int row, int64_t first, float* scores) {
  const char* key[kKeys];
  for (int k = 0; k < kKeys; ++k)
    key[k] = piece.keys + (first + k < piece.count ? first + k : piece.count - 1) * piece.key_stride;
  const float* query = piece.queries + row * piece.query_stride;
  Vec sums[kRows * kKeys];
  for (int i = 0; i < kRows * kKeys; ++i) sums[i] = Vec::zero();
  int64_t i = 0;
  for (; i + kLanes <= piece.head_size; i += kLanes) {
    Vec values[kKeys];
    for (int k = 0; k < kKeys; ++k) values[k] = kLoad(key[k] + i * kBytes);
    for (int r = 0; r < kRows; ++r) {
      const Vec q = Vec::load(query + r * piece.query_stride + i);
      for (int k = 0; k < kKeys; ++k) sums[r * kKeys + k] = Vec::fused(q, values[k], sums[r * kKeys + k]);
    }
  }
  if (i < piece.head_size) {
    for (int k = 0; k < kKeys; ++k) {
      const Vec value = load_part<kLoad, kBytes>(key[k] + i * kBytes, piece.head_size - i);
      for (int r = 0; r < kRows; ++r)
        sums[r * kKeys + k] =
            Vec::fused(Vec::load(query + r * piece.query_stride + i), value, sums[r * kKeys + k]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    Vec::reduce<kKeys>(sums + r * kKeys, scores + (row + r) * kAttentionKeys + first);
}

template <LoadVec kLoad, int kBytes, int kRows>
void score_rows(const AttentionPiece& piece, int row, float* scores) {
  constexpr int kKeys = kRows == 1 ? kScoreKeys1 : kScoreKeys;
  static_assert(kAttentionKeys % kKeys == 0, "a piece is whole tiles of keys");
  for (int64_t first = 0; first < piece.count; first += kKeys) {
    if (row == 0)
      for (int64_t k = first; k < first + kKeys && k < piece.count; ++k)
        prefetch_row(piece.values + k * piece.value_stride, piece.value_size * kBytes);
    score_tile<kLoad, kBytes, kRows, kKeys>(piece, row, first, scores);
  }
}

// c tanh(x / c).
inline Vec capped(const Vec& x, const Vec& cap, const Vec& twice_inverse) {
  const Vec one = Vec::broadcast(1.0f);
  const Vec power = exponential(Vec::mul(x, twice_inverse));
  const Vec tanh = Vec::fused(Vec::broadcast(-2.0f), Vec::div(one, Vec::add(power, one)), one);
  return Vec::mul(tanh, cap);
}

// Turns the scores of a row into weights.
inline void weigh(const AttentionPiece& piece, int row, float* scores) {
  const int64_t padded = padded_size(piece.count);
  for (int64_t i = piece.count; i < padded; ++i) scores[i] = -__builtin_inff();
  const float* addends = piece.addends == nullptr ? nullptr : piece.addends[row];
  const Vec cap = Vec::broadcast(piece.softcap),
            twice_inverse = Vec::broadcast(piece.softcap == 0.0f ? 0.0f : 2.0f / piece.softcap);
  Vec most = Vec::broadcast(-__builtin_inff());
  for (int64_t i = 0; i < padded; i += kLanes) {
    Vec score = Vec::load(scores + i);
    // A capped -inf is finite, so that the end of the last vector is put back below.
    if (piece.softcap != 0.0f) score = capped(score, cap, twice_inverse);
    if (addends != nullptr) score = Vec::add(score, Vec::load(addends + i));
    score.store(scores + i);
    if (i + kLanes > piece.count) {
      for (int64_t j = piece.count; j < padded; ++j) scores[j] = -__builtin_inff();
      score = Vec::load(scores + i);
    }
    most = Vec::max(score, most);  // of NaN and a number the number, so that NaN is found in the weights
  }
  float lanes[kLanes], largest = -__builtin_inff();
  most.store(lanes);
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  // Where nothing is visible, the weights are exp(-inf - 0).
  const Vec subtracted = Vec::broadcast(largest == -__builtin_inff() ? 0.0f : -largest);
  Vec total = Vec::zero();
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec weight = exponential(Vec::add(Vec::load(scores + i), subtracted));
    weight.store(scores + i);
    total = Vec::add(total, weight);
  }
  total.store(lanes);
  piece.largest[row * piece.result_stride] = largest;
  piece.sum[row * piece.result_stride] = tree_sum(lanes);
}

// Weighted sums of kVecs vectors of the values, from element `first` on, for kRows rows. `part`: the elements
// of a last vector that is not whole, else 0.
template <LoadVec kLoad, int kBytes, int kRows, int kVecs>
inline void value_tile(const AttentionPiece& piece, int row, int64_t first, int64_t part,
                       const float* weights) {
  Vec sums[kRows * kVecs];
  for (int i = 0; i < kRows * kVecs; ++i) sums[i] = Vec::zero();
  const char* values = piece.values + first * kBytes;
  weights += row * kAttentionKeys;
  // The keys of the next piece, which mostly follow.
  const bool ahead = row == 0 && first == 0;
  for (int64_t t = 0; t < piece.count; ++t, values += piece.value_stride) {
    if (ahead) prefetch_row(piece.keys + (piece.count + t) * piece.key_stride, piece.head_size * kBytes);
    Vec value[kVecs];
    for (int v = 0; v < kVecs; ++v)
      value[v] = part == 0 ? kLoad(values + v * kLanes * kBytes) : load_part<kLoad, kBytes>(values, part);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Vec::broadcast(weights[r * kAttentionKeys + t]);
      for (int v = 0; v < kVecs; ++v) sums[r * kVecs + v] = Vec::fused(weight, value[v], sums[r * kVecs + v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v)
      sums[r * kVecs + v].store(piece.out + (row + r) * piece.out_stride + first + v * kLanes);
}

template <LoadVec kLoad, int kBytes, int kRows>
void value_rows(const AttentionPiece& piece, int row, const float* weights) {
  int64_t i = 0;
  for (; i + kValueVecs * kLanes <= piece.value_size; i += kValueVecs * kLanes)
    value_tile<kLoad, kBytes, kRows, kValueVecs>(piece, row, i, 0, weights);
  for (; i + kLanes <= piece.value_size; i += kLanes)
    value_tile<kLoad, kBytes, kRows, 1>(piece, row, i, 0, weights);
  if (i < piece.value_size) value_tile<kLoad, kBytes, kRows, 1>(piece, row, i, piece.value_size - i, weights);
}

// Calls Rows<n>::run for groups of at most kRows rows.
template <LoadVec kLoad, int kBytes, int kRows>
void all_scores(const AttentionPiece& piece, int row, float* scores) {
  for (; row + kRows <= piece.rows; row += kRows) score_rows<kLoad, kBytes, kRows>(piece, row, scores);
  if constexpr (kRows > 1)
    if (row < piece.rows) all_scores<kLoad, kBytes, kRows - 1>(piece, row, scores);
}

template <LoadVec kLoad, int kBytes, int kRows>
void all_values(const AttentionPiece& piece, int row, const float* weights) {
  for (; row + kRows <= piece.rows; row += kRows) value_rows<kLoad, kBytes, kRows>(piece, row, weights);
  if constexpr (kRows > 1)
    if (row < piece.rows) all_values<kLoad, kBytes, kRows - 1>(piece, row, weights);
}

template <LoadVec kLoad, int kBytes>
void attention_piece_as(const AttentionPiece& piece) {
  float scores[kAttentionRows * kAttentionKeys];
  all_scores<kLoad, kBytes, kScoreRows>(piece, 0, scores);
  for (int row = 0; row < piece.rows; ++row) weigh(piece, row, scores + row * kAttentionKeys);
  all_values<kLoad, kBytes, kScoreRows>(piece, 0, scores);
}

void attention_piece(const AttentionPiece& piece) {
  if (piece.dtype == LB2_FLOAT32) return attention_piece_as<load_float, 4>(piece);
  if (piece.dtype == LB2_FLOAT16) return attention_piece_as<load_half, 2>(piece);
  return attention_piece_as<load_bfloat, 2>(piece);
}

// The weights of the pieces, 16 at a time, are exp(their largest score - the largest of all).
void attention_combine(const AttentionRow& row, float* result) {
  float largest = -__builtin_inff();
  for (int64_t p = 0; p < row.pieces; ++p) largest = row.largest[p] > largest ? row.largest[p] : largest;
  const float subtracted = largest == -__builtin_inff() ? 0.0f : largest;
  const int64_t padded = padded_size(row.value_size);
  for (int64_t i = 0; i < padded; i += kLanes) Vec::zero().store(result + i);
  float total = 0.0f;
  for (int64_t first = 0; first < row.pieces; first += kLanes) {
    const int64_t count = row.pieces - first < kLanes ? row.pieces - first : kLanes;
    float weights[kLanes] = {};
    for (int64_t p = 0; p < count; ++p) weights[p] = row.largest[first + p] - subtracted;
    exponential(Vec::load(weights)).store(weights);
    for (int64_t p = 0; p < count; ++p) {
      // What nothing of was visible has no values.
      if (row.sum[first + p] == 0.0f) continue;
      total += weights[p] * row.sum[first + p];
      const Vec weight = Vec::broadcast(weights[p]);
      const float* out = row.out + (first + p) * row.out_stride;
      for (int64_t i = 0; i < padded; i += kLanes)
        Vec::fused(weight, Vec::load(out + i), Vec::load(result + i)).store(result + i);
    }
  }
  if (total == 0.0f) return;
  const Vec divisor = Vec::broadcast(total);
  for (int64_t i = 0; i < padded; i += kLanes) Vec::div(Vec::load(result + i), divisor).store(result + i);
}

constexpr AttentionKernels kAttention = {attention_piece, attention_combine};
