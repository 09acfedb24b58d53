// How tables of 16-bit entries are scaled, for kernels whose `Vec` is several registers. Include this after
// lookup/body.h, where elementwise_body.h says; lookup/<isa>_body.h defines what is only declared here.

// Magnitudes of the 15 columns of a word, lane 15 zero.
Vec word_columns(const float* z);
// To the nearest integers, ties to even.
Vec rounded(const Vec& v);
// 16-bit tables of y, whose window sums are known to fit.
void build_words(const float* y, int64_t words, char* tables);

inline float tree_sum(const Vec& v) {
  float lanes[kLanes];
  v.store(lanes);
  return tree_sum(lanes);
}

float build_int16(float* z, int64_t words, char* tables) {
  Vec most = Vec::zero(), total = Vec::zero();
  for (int64_t w = 0; w < words; w += kWindowWords) {
    const float* columns = z + w * kWordCols;
    const Vec sum = Vec::add(word_columns(columns), word_columns(columns + kWordCols));
    most = Vec::max(most, sum);
    total = Vec::add(total, sum);
  }
  const ChunkScale scale = chunk_scale(kInt16Limit, tree_sum(most), tree_sum(total));
  for (int64_t i = 0; i < words * kWordCols; i += kLanes)
    Vec::mul(Vec::load(z + i), Vec::broadcast(scale.factor)).store(z + i);
  build_words(z, words, tables);
  return scale.unit;
}

float build_int8(float* z, int64_t words, char* tables) {
  Vec most = Vec::zero(), total = Vec::zero();
  for (int64_t w = 0; w < words; ++w) {
    const Vec columns = word_columns(z + w * kWordCols);
    most = Vec::max(most, columns);
    total = Vec::add(total, columns);
  }
  float lanes[kLanes], bound = 0.0f;
  most.store(lanes);
  for (const float lane : lanes) bound = lane > bound ? lane : bound;
  const ChunkScale scale = chunk_scale(kInt8Limit, bound, tree_sum(total));
  for (int64_t i = 0; i < words * kWordCols; i += kLanes)
    rounded(Vec::mul(Vec::load(z + i), Vec::broadcast(scale.factor))).store(z + i);
  build_words(z, words, tables);
  return scale.unit;
}
