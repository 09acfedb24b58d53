// The lookup kernels for AVX2. Include this where elementwise_body.h says.
//
// Registers hold 8 or 16 entries, so only the 16 entries with bit 4 clear are stored; the others are their
// negatives: entry(e) = -entry(~e), exactly. A group's fp32 table is 16 floats, its int16 table the 16 low
// bytes, then the 16 high bytes.

constexpr int64_t kHalfTable = kTableEntries / 2;

inline __m256 entry_signs(__m256i entries, int bit) {
  const __m256i top = _mm256_sll_epi32(entries, _mm_cvtsi32_si128(31 - bit));
  return _mm256_or_ps(_mm256_and_ps(_mm256_castsi256_ps(top), _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
}

// Entries 8 kUpper .. 8 kUpper + 7 of a group.
template <int kUpper>
inline __m256 signed_sums(const float* z) {
  const __m256i entries =
      _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(8 * kUpper));
  __m256 sum = _mm256_mul_ps(entry_signs(entries, 0), _mm256_set1_ps(z[0]));
  for (int column = 1; column < kGroupCols; ++column)
    sum = _mm256_fmadd_ps(entry_signs(entries, column), _mm256_set1_ps(z[column]), sum);
  return sum;
}

float build_exact(float* z, int64_t words, char* tables) {
  float* out = reinterpret_cast<float*>(tables);
  for (int64_t g = 0; g < words * kWordGroups; ++g, z += kGroupCols, out += kHalfTable) {
    _mm256_storeu_ps(out, signed_sums<0>(z));
    _mm256_storeu_ps(out + 8, signed_sums<1>(z));
  }
  return 1.0f;
}

inline void build_words(const float* y, int64_t words, char* tables) {
  const __m256i low_byte = _mm256_set1_epi16(0xFF);
  for (int64_t g = 0; g < words * kWordGroups; ++g, y += kGroupCols, tables += 32) {
    const __m256i lower = _mm256_cvtps_epi32(signed_sums<0>(y));
    const __m256i upper = _mm256_cvtps_epi32(signed_sums<1>(y));
    // packs works within 128-bit halves; put the four quarters back in order.
    const __m256i entries =
        _mm256_permute4x64_epi64(_mm256_packs_epi32(lower, upper), _MM_SHUFFLE(3, 1, 2, 0));
    const __m256i bytes =
        _mm256_packus_epi16(_mm256_and_si256(entries, low_byte), _mm256_srli_epi16(entries, 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables),
                        _mm256_permute4x64_epi64(bytes, _MM_SHUFFLE(3, 1, 2, 0)));
  }
}

inline Vec magnitude(const Vec& v) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX));
  return {_mm256_and_ps(v.low, mask), _mm256_and_ps(v.high, mask)};
}
// The 15 columns of a word, lane 15 zero.
inline Vec word_columns(const float* z) {
  Vec columns = Vec::load(z);
  columns.high = _mm256_blend_ps(columns.high, _mm256_setzero_ps(), 0x80);
  return magnitude(columns);
}
inline Vec most_of(const Vec& a, const Vec& b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
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
    most = most_of(most, sum);
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
    most = most_of(most, columns);
    total = Vec::add(total, columns);
  }
  float lanes[kLanes], bound = 0.0f;
  most.store(lanes);
  for (const float lane : lanes) bound = lane > bound ? lane : bound;
  const ChunkScale scale = chunk_scale(kInt8Limit, bound, tree_sum(total));
  for (int64_t i = 0; i < words * kWordCols; i += kLanes) {
    const Vec y = Vec::mul(Vec::load(z + i), Vec::broadcast(scale.factor));
    const Vec rounded = {_mm256_round_ps(y.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                         _mm256_round_ps(y.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    rounded.store(z + i);
  }
  build_words(z, words, tables);
  return scale.unit;
}

float build_sign(float* z, int64_t words, char* tables) {
  for (int64_t w = 0; w < words; ++w) {
    const Vec columns = Vec::load(z + w * kWordCols);
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(columns.low, _mm256_setzero_ps(), _CMP_LT_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(columns.high, _mm256_setzero_ps(), _CMP_LT_OQ));
    const uint16_t bits = static_cast<uint16_t>((low | high << 8) & ((1 << kWordCols) - 1));
    std::memcpy(tables + w * kSignTableBytes, &bits, 2);
  }
  return 1.0f;
}

inline __m256i load_words(const char* data, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + half * 32));
}

inline void finish_block(const RowSums& out, int64_t token, int64_t block, __m256 rows0, __m256 upper_rows0,
                         __m256 rows1, __m256 upper_rows1) {
  float* target = out.data + token * out.stride + block * kBlockRows;
  const __m256 parts[] = {rows0, rows1, upper_rows0, upper_rows1};
  for (int i = 0; i < 4; ++i)
    _mm256_storeu_ps(target + 8 * i,
                     out.add ? _mm256_add_ps(_mm256_loadu_ps(target + 8 * i), parts[i]) : parts[i]);
}

// Entries of rows whose group starts at bit kBit of their 32-bit lanes.
template <int kBit>
struct ExactIndex {
  __m256i index, negative, select;
  explicit ExactIndex(__m256i words) {
    const __m256i top = _mm256_slli_epi32(words, 31 - (kBit + 4));
    const __m256i flip = _mm256_srai_epi32(top, 31);
    index = _mm256_xor_si256(kBit == 0 ? words : _mm256_srli_epi32(words, kBit), flip);
    negative = _mm256_and_si256(top, _mm256_set1_epi32(INT32_MIN));
    select = _mm256_slli_epi32(index, 28);
  }
  __m256 find(__m256 low, __m256 high) const {
    const __m256 found = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                          _mm256_permutevar8x32_ps(high, index), _mm256_castsi256_ps(select));
    return _mm256_xor_ps(found, _mm256_castsi256_ps(negative));
  }
};

template <int kGroup, int kTokens>
inline void exact_group(__m256i words, const char* tables, int64_t stride, __m256* rows, __m256* upper_rows) {
  const ExactIndex<kGroup * kGroupCols> index(words);
  const ExactIndex<16 + kGroup * kGroupCols> upper_index(words);
  for (int t = 0; t < kTokens; ++t) {
    const float* table = reinterpret_cast<const float*>(tables + t * stride) + kGroup * kHalfTable;
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    rows[t] = _mm256_add_ps(rows[t], index.find(low, high));
    upper_rows[t] = _mm256_add_ps(upper_rows[t], upper_index.find(low, high));
  }
}

template <int kBlocks, int kTokens>
struct ExactBlocks {
  static_assert(kBlocks == 1, "one block at a time");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    __m256 rows[2][kTokens], upper_rows[2][kTokens];
    for (int half = 0; half < 2; ++half)
      for (int t = 0; t < kTokens; ++t) rows[half][t] = upper_rows[half][t] = _mm256_setzero_ps();
    const char* data = tile.data + block * kBlockBytes;
    const char* table = tables.data + token * tables.stride;
    for (int64_t w = 0; w < tile.words; ++w) {
      for (int half = 0; half < 2; ++half) {
        const __m256i words = load_words(data, half);
        exact_group<0, kTokens>(words, table, tables.stride, rows[half], upper_rows[half]);
        exact_group<1, kTokens>(words, table, tables.stride, rows[half], upper_rows[half]);
        exact_group<2, kTokens>(words, table, tables.stride, rows[half], upper_rows[half]);
      }
      data += tile.blocks * kBlockBytes;
      table += kExactTableBytes / 2;
    }
    for (int t = 0; t < kTokens; ++t)
      finish_block(out, token + t, block, rows[0][t], upper_rows[0][t], rows[1][t], upper_rows[1][t]);
  }
};

template <int kGroup>
struct Int16Index {
  __m256i flip, bytes;
  explicit Int16Index(__m256i words) {
    constexpr int kBit = kGroup * kGroupCols;
    flip = _mm256_srai_epi16(_mm256_slli_epi16(words, 15 - (kBit + 4)), 15);
    const __m256i index = _mm256_and_si256(
        _mm256_xor_si256(kBit == 0 ? words : _mm256_srli_epi16(words, kBit), flip), _mm256_set1_epi16(15));
    bytes = _mm256_or_si256(index, _mm256_slli_epi16(index, 8));
  }
  __m256i find(const char* table) const {
    const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    const __m256i high =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16)));
    const __m256i found =
        _mm256_blendv_epi8(_mm256_shuffle_epi8(low, bytes), _mm256_shuffle_epi8(high, bytes),
                           _mm256_set1_epi16(static_cast<int16_t>(0xFF00)));
    return _mm256_sub_epi16(_mm256_xor_si256(found, flip), flip);
  }
};

template <int kGroup, int kTokens>
inline void int16_group(__m256i words, const char* tables, int64_t stride, __m256i* sums) {
  const Int16Index<kGroup> index(words);
  for (int t = 0; t < kTokens; ++t)
    sums[t] = _mm256_add_epi16(sums[t], index.find(tables + t * stride + kGroup * 32));
}

template <int kBlocks, int kTokens>
struct Int16Blocks {
  static_assert(kBlocks == 1, "one block at a time");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    const __m256i even = _mm256_set1_epi32(1), odd = _mm256_set1_epi32(1 << 16);
    __m256i rows[2][kTokens], upper_rows[2][kTokens];
    for (int half = 0; half < 2; ++half)
      for (int t = 0; t < kTokens; ++t) rows[half][t] = upper_rows[half][t] = _mm256_setzero_si256();
    const char* data = tile.data + block * kBlockBytes;
    const char* table = tables.data + token * tables.stride;
    const int64_t step = tile.blocks * kBlockBytes;
    for (int64_t w = 0; w < tile.words; w += kWindowWords) {
      for (int half = 0; half < 2; ++half) {
        __m256i sums[kTokens];
        for (int t = 0; t < kTokens; ++t) sums[t] = _mm256_setzero_si256();
        for (int i = 0; i < kWindowWords; ++i) {
          const __m256i words = load_words(data + i * step, half);
          const char* entries = table + i * (kInt16TableBytes / 2);
          int16_group<0, kTokens>(words, entries, tables.stride, sums);
          int16_group<1, kTokens>(words, entries, tables.stride, sums);
          int16_group<2, kTokens>(words, entries, tables.stride, sums);
        }
        for (int t = 0; t < kTokens; ++t) {
          rows[half][t] = _mm256_add_epi32(rows[half][t], _mm256_madd_epi16(sums[t], even));
          upper_rows[half][t] = _mm256_add_epi32(upper_rows[half][t], _mm256_madd_epi16(sums[t], odd));
        }
      }
      data += kWindowWords * step;
      table += kWindowWords * kInt16TableBytes / 2;
    }
    for (int t = 0; t < kTokens; ++t) {
      const __m256 scale = _mm256_set1_ps(tables.scales[token + t]);
      const auto scaled = [&](__m256i sums) { return _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sums)); };
      finish_block(out, token + t, block, scaled(rows[0][t]), scaled(upper_rows[0][t]), scaled(rows[1][t]),
                   scaled(upper_rows[1][t]));
    }
  }
};

// Bits set in each 16-bit lane.
inline __m256i popcount16(__m256i v) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i counts =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i low = _mm256_shuffle_epi8(counts, _mm256_and_si256(v, nibble));
  const __m256i high = _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
  return _mm256_maddubs_epi16(_mm256_add_epi8(low, high), _mm256_set1_epi8(1));
}

template <int kBlocks, int kTokens>
struct SignBlocks {
  static_assert(kBlocks == 1, "one block at a time");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    __m256i mismatches[2][kTokens];  // at most kChunkCols, so 16 bits hold them
    for (int half = 0; half < 2; ++half)
      for (int t = 0; t < kTokens; ++t) mismatches[half][t] = _mm256_setzero_si256();
    const char* data = tile.data + block * kBlockBytes;
    for (int64_t w = 0; w < tile.words; ++w, data += tile.blocks * kBlockBytes) {
      const __m256i words[2] = {load_words(data, 0), load_words(data, 1)};
      for (int t = 0; t < kTokens; ++t) {
        int16_t signs;
        std::memcpy(&signs, tables.data + (token + t) * tables.stride + w * kSignTableBytes, 2);
        for (int half = 0; half < 2; ++half) {
          const __m256i differ = _mm256_xor_si256(words[half], _mm256_set1_epi16(signs));
          mismatches[half][t] = _mm256_add_epi16(mismatches[half][t], popcount16(differ));
        }
      }
    }
    const __m256i columns = _mm256_set1_epi32(static_cast<int>(tables.columns));
    const auto counts = [&](__m256i differ) {
      return _mm256_cvtepi32_ps(_mm256_sub_epi32(columns, _mm256_slli_epi32(differ, 1)));
    };
    for (int t = 0; t < kTokens; ++t) {
      __m256 rows[2], upper_rows[2];
      for (int half = 0; half < 2; ++half) {
        rows[half] = counts(_mm256_and_si256(mismatches[half][t], _mm256_set1_epi32(0xFFFF)));
        upper_rows[half] = counts(_mm256_srli_epi32(mismatches[half][t], 16));
      }
      finish_block(out, token + t, block, rows[0], upper_rows[0], rows[1], upper_rows[1]);
    }
  }
};

const LookupKernels kLookup = {
    {kExactTableBytes / 2, 2, build_exact, run_tile<ExactBlocks, 1, 1, 0>},
    {kInt16TableBytes / 2, 2, build_int16, run_tile<Int16Blocks, 1, 1, 0>},
    {kInt16TableBytes / 2, 2, build_int8, run_tile<Int16Blocks, 1, 1, 0>},
    {kSignTableBytes, 2, build_sign, run_tile<SignBlocks, 1, 1, 0>},
    load_scaled,
    load_latents,
    abs_sum,
    scale_rows,
    add_bias,
    store,
    128 * 1024,
};
