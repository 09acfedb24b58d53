// The lookup kernels for AVX-512, for files with and without VNNI and BITALG. Include this where
// lookup/body.h says.

// Keeps a value in a register: compilers otherwise load it again for every use, and run out of load ports.
#define LB2_IN_REGISTER(value) __asm__("" : "+v"(value))

// Loops over the registers of a tile: left as loops, even briefly, they put the registers in memory.
#if defined(__clang__)
#define LB2_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LB2_UNROLL _Pragma("GCC unroll 16")
#endif

constexpr int64_t kPrefetchBytes = 8192;  // what memory delivers in its latency, several times

// -1 in the lanes whose table entry has bit `bit` set, else +1; lane i stands for entry entries[i].
inline __m512 entry_signs(__m512i entries, int bit) {
  const __mmask16 negative = _mm512_test_epi32_mask(entries, _mm512_set1_epi32(1 << bit));
  return _mm512_mask_blend_ps(negative, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}

// tree_sum of elementwise_body.h in registers.
inline float tree_sum(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Sums of one group whose entry has bit 4 clear.
struct HalfSums {
  __m512 s0, s1, s2, s3;
  HalfSums() {
    const __m512i entries = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    s0 = entry_signs(entries, 0);
    s1 = entry_signs(entries, 1);
    s2 = entry_signs(entries, 2);
    s3 = entry_signs(entries, 3);
  }
  __m512 first_four(const float* z) const {
    __m512 sum = _mm512_mul_ps(s0, _mm512_set1_ps(z[0]));
    sum = _mm512_fmadd_ps(s1, _mm512_set1_ps(z[1]), sum);
    sum = _mm512_fmadd_ps(s2, _mm512_set1_ps(z[2]), sum);
    return _mm512_fmadd_ps(s3, _mm512_set1_ps(z[3]), sum);
  }
};

float build_exact(float* z, int64_t words, char* tables) {
  const HalfSums half;
  float* out = reinterpret_cast<float*>(tables);
  for (int64_t g = 0; g < words * kWordGroups; ++g, z += kGroupCols, out += kTableEntries) {
    const __m512 sum = half.first_four(z), last = _mm512_set1_ps(z[4]);
    _mm512_storeu_ps(out, _mm512_add_ps(sum, last));
    _mm512_storeu_ps(out + 16, _mm512_sub_ps(sum, last));
  }
  return 1.0f;
}

// 16-bit tables of y, whose window sums are known to fit.
inline void build_words(const float* y, int64_t words, char* tables) {
  const HalfSums half;
  // entry(e) for e < 16, then entry(e) = -entry(31 - e): low words of 16 + 16 lanes.
  const __m512i low =
      _mm512_setr_epi32(0x20000, 0x60004, 0xA0008, 0xE000C, 0x120010, 0x160014, 0x1A0018, 0x1E001C, 0x3C003E,
                        0x38003A, 0x340036, 0x300032, 0x2C002E, 0x28002A, 0x240026, 0x200022);
  for (int64_t g = 0; g < words * kWordGroups; ++g, y += kGroupCols, tables += 64) {
    const __m512 sum = _mm512_add_ps(half.first_four(y), _mm512_set1_ps(y[4]));
    const __m512i entries = _mm512_cvtps_epi32(sum);
    const __m512i negative = _mm512_sub_epi32(_mm512_setzero_si512(), entries);
    _mm512_storeu_si512(tables, _mm512_permutex2var_epi16(entries, low, negative));
  }
}

float build_int16(float* z, int64_t words, char* tables) {
  __m512 most = _mm512_setzero_ps(), total = most;
  const __mmask16 word = (1 << kWordCols) - 1;
  for (int64_t w = 0; w < words; w += kWindowWords) {
    const float* columns = z + w * kWordCols;
    const __m512 first = _mm512_abs_ps(_mm512_maskz_loadu_ps(word, columns));
    const __m512 sum = _mm512_add_ps(first, _mm512_abs_ps(_mm512_maskz_loadu_ps(word, columns + kWordCols)));
    most = _mm512_max_ps(most, sum);
    total = _mm512_add_ps(total, sum);
  }
  const ChunkScale scale = chunk_scale(kInt16Limit, tree_sum(most), tree_sum(total));
  for (int64_t i = 0; i < words * kWordCols; i += 16)
    _mm512_storeu_ps(z + i, _mm512_mul_ps(_mm512_loadu_ps(z + i), _mm512_set1_ps(scale.factor)));
  build_words(z, words, tables);
  return scale.unit;
}

float build_int8(float* z, int64_t words, char* tables) {
  __m512 most = _mm512_setzero_ps(), total = most;
  for (int64_t w = 0; w < words; ++w) {
    const __m512 columns = _mm512_abs_ps(_mm512_maskz_loadu_ps((1 << kWordCols) - 1, z + w * kWordCols));
    most = _mm512_max_ps(most, columns);
    total = _mm512_add_ps(total, columns);
  }
  const ChunkScale scale = chunk_scale(kInt8Limit, _mm512_reduce_max_ps(most), tree_sum(total));
  for (int64_t i = 0; i < words * kWordCols; i += 16) {
    const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(z + i), _mm512_set1_ps(scale.factor));
    _mm512_storeu_ps(z + i, _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT));
  }
  build_words(z, words, tables);
  return scale.unit;
}

// Bit c of a word's entry is set where column c is negative.
float build_sign(float* z, int64_t words, char* tables) {
  for (int64_t w = 0; w < words; ++w) {
    const __m512 columns = _mm512_maskz_loadu_ps((1 << kWordCols) - 1, z + w * kWordCols);
    const uint16_t bits = _mm512_cmp_ps_mask(columns, _mm512_setzero_ps(), _CMP_LT_OQ);
    std::memcpy(tables + 2 * w, &bits, 2);
  }
  return 1.0f;
}

inline void finish_block(const RowSums& out, int64_t token, int64_t block, __m512 rows, __m512 upper_rows) {
  float* target = out.data + token * out.stride + block * kBlockRows;
  if (out.add) {
    rows = _mm512_add_ps(_mm512_loadu_ps(target), rows);
    upper_rows = _mm512_add_ps(_mm512_loadu_ps(target + 16), upper_rows);
  }
  _mm512_storeu_ps(target, rows);
  _mm512_storeu_ps(target + 16, upper_rows);
}

template <int kBlocks>
inline void load_words(const char* data, __m512i* words) {
  LB2_UNROLL
  for (int b = 0; b < kBlocks; ++b) {
    words[b] = _mm512_loadu_si512(data + b * kBlockBytes);
    LB2_IN_REGISTER(words[b]);
    _mm_prefetch(data + b * kBlockBytes + kPrefetchBytes, _MM_HINT_T0);
  }
}

// Adds the even 16-bit lanes of `sums` to the 32-bit lanes of `rows`, the odd ones to `upper_rows`.
inline void widen(__m512i sums, __m512i& rows, __m512i& upper_rows) {
#if defined(__AVX512VNNI__)
  // Assembly: compilers copy the accumulators around the intrinsic, keep the constants in registers, and run
  // out.
  static constexpr int32_t kEven = 1, kOdd = 1 << 16;
  __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(rows) : "v"(sums), "m"(kEven));
  __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(upper_rows) : "v"(sums), "m"(kOdd));
#else
  rows = _mm512_add_epi32(rows, _mm512_madd_epi16(sums, _mm512_set1_epi32(1)));
  upper_rows = _mm512_add_epi32(upper_rows, _mm512_madd_epi16(sums, _mm512_set1_epi32(1 << 16)));
#endif
}

// One group of five columns of kBlocks blocks, for the rows in the low halves of the 32-bit lanes and those
// in the upper ones.
template <int kBlocks, int kTokens, int kGroup>
inline void exact_group(const __m512i* words, const char* tables, int64_t stride, __m512* rows,
                        __m512* upper_rows) {
  __m512 low[kTokens], high[kTokens];
  LB2_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const float* table = reinterpret_cast<const float*>(tables + t * stride) + kGroup * kTableEntries;
    low[t] = _mm512_loadu_ps(table);
    high[t] = _mm512_loadu_ps(table + 16);
    LB2_IN_REGISTER(low[t]);
    LB2_IN_REGISTER(high[t]);
  }
  LB2_UNROLL
  for (int b = 0; b < kBlocks; ++b) {
    const __m512i index = kGroup == 0 ? words[b] : _mm512_srli_epi32(words[b], kGroup * kGroupCols);
    const __m512i upper_index = _mm512_srli_epi32(words[b], 16 + kGroup * kGroupCols);
    LB2_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const int i = t * kBlocks + b;
      rows[i] = _mm512_add_ps(rows[i], _mm512_permutex2var_ps(low[t], index, high[t]));
      upper_rows[i] = _mm512_add_ps(upper_rows[i], _mm512_permutex2var_ps(low[t], upper_index, high[t]));
    }
  }
}

template <int kBlocks, int kTokens>
struct ExactBlocks {
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    __m512 rows[kBlocks * kTokens], upper_rows[kBlocks * kTokens];
    LB2_UNROLL
    for (int i = 0; i < kBlocks * kTokens; ++i) rows[i] = upper_rows[i] = _mm512_setzero_ps();
    const char* data = tile.data + block * kBlockBytes;
    const char* table = tables.data + token * tables.stride;
    for (int64_t w = 0; w < tile.words; ++w) {
      __m512i words[kBlocks];
      load_words<kBlocks>(data, words);
      exact_group<kBlocks, kTokens, 0>(words, table, tables.stride, rows, upper_rows);
      exact_group<kBlocks, kTokens, 1>(words, table, tables.stride, rows, upper_rows);
      exact_group<kBlocks, kTokens, 2>(words, table, tables.stride, rows, upper_rows);
      data += tile.blocks * kBlockBytes;
      table += kExactTableBytes;
    }
    LB2_UNROLL
    for (int t = 0; t < kTokens; ++t) LB2_UNROLL
    for (int b = 0; b < kBlocks; ++b)
      finish_block(out, token + t, block + b, rows[t * kBlocks + b], upper_rows[t * kBlocks + b]);
  }
};

template <int kBlocks, int kTokens, int kGroup>
inline void int16_group(const __m512i* words, const char* tables, int64_t stride, bool first, __m512i* sums) {
  __m512i table[kTokens];
  LB2_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    table[t] = _mm512_loadu_si512(tables + t * stride + kGroup * 64);
    if (kBlocks > 2) LB2_IN_REGISTER(table[t]);
  }
  LB2_UNROLL
  for (int b = 0; b < kBlocks; ++b) {
    const __m512i index = kGroup == 0 ? words[b] : _mm512_srli_epi16(words[b], kGroup * kGroupCols);
    LB2_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const __m512i found = _mm512_permutexvar_epi16(index, table[t]);
      __m512i& sum = sums[t * kBlocks + b];
      sum = first ? found : _mm512_add_epi16(sum, found);
      // Else compilers gather first and add later, with more live registers than there are.
      LB2_IN_REGISTER(sum);
    }
  }
}

template <int kBlocks, int kTokens>
struct Int16Blocks {
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    __m512i rows[kBlocks * kTokens], upper_rows[kBlocks * kTokens];
    LB2_UNROLL
    for (int i = 0; i < kBlocks * kTokens; ++i) rows[i] = upper_rows[i] = _mm512_setzero_si512();
    const char* data = tile.data + block * kBlockBytes;
    const char* table = tables.data + token * tables.stride;
    for (int64_t w = 0; w < tile.words; w += kWindowWords) {
      __m512i sums[kBlocks * kTokens];
      LB2_UNROLL
      for (int i = 0; i < kWindowWords; ++i) {
        __m512i words[kBlocks];
        load_words<kBlocks>(data, words);
        int16_group<kBlocks, kTokens, 0>(words, table, tables.stride, i == 0, sums);
        int16_group<kBlocks, kTokens, 1>(words, table, tables.stride, false, sums);
        int16_group<kBlocks, kTokens, 2>(words, table, tables.stride, false, sums);
        data += tile.blocks * kBlockBytes;
        table += kInt16TableBytes;
      }
      LB2_UNROLL
      for (int i = 0; i < kBlocks * kTokens; ++i) widen(sums[i], rows[i], upper_rows[i]);
    }
    LB2_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const __m512 scale = _mm512_set1_ps(tables.scales[token + t]);
      LB2_UNROLL
      for (int b = 0; b < kBlocks; ++b)
        finish_block(out, token + t, block + b,
                     _mm512_mul_ps(scale, _mm512_cvtepi32_ps(rows[t * kBlocks + b])),
                     _mm512_mul_ps(scale, _mm512_cvtepi32_ps(upper_rows[t * kBlocks + b])));
    }
  }
};

// Bits set in each 16-bit lane.
inline __m512i popcount16(__m512i v) {
#if defined(__AVX512BITALG__)
  return _mm512_popcnt_epi16(v);
#else
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i counts =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_shuffle_epi8(counts, _mm512_and_si512(v, nibble));
  const __m512i high = _mm512_shuffle_epi8(counts, _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble));
  return _mm512_maddubs_epi16(_mm512_add_epi8(low, high), _mm512_set1_epi8(1));
#endif
}

template <int kBlocks, int kTokens>
struct SignBlocks {
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    __m512i mismatches[kBlocks * kTokens];  // at most kChunkCols, so 16 bits hold them
    LB2_UNROLL
    for (int i = 0; i < kBlocks * kTokens; ++i) mismatches[i] = _mm512_setzero_si512();
    const char* data = tile.data + block * kBlockBytes;
    const char* table = tables.data + token * tables.stride;
    for (int64_t w = 0; w < tile.words; ++w) {
      __m512i words[kBlocks];
      load_words<kBlocks>(data, words);
      LB2_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        int16_t signs;
        std::memcpy(&signs, table + t * tables.stride + 2 * w, 2);
        const __m512i columns = _mm512_set1_epi16(signs);
        LB2_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
          __m512i& sum = mismatches[t * kBlocks + b];
          sum = _mm512_add_epi16(sum, popcount16(_mm512_xor_si512(words[b], columns)));
        }
      }
      data += tile.blocks * kBlockBytes;
    }
    LB2_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const __m512i columns = _mm512_set1_epi32(static_cast<int>(tables.columns));
      LB2_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        const __m512i count = mismatches[t * kBlocks + b];
        const __m512i low = _mm512_and_si512(count, _mm512_set1_epi32(0xFFFF)),
                      high = _mm512_srli_epi32(count, 16);
        finish_block(out, token + t, block + b,
                     _mm512_cvtepi32_ps(_mm512_sub_epi32(columns, _mm512_slli_epi32(low, 1))),
                     _mm512_cvtepi32_ps(_mm512_sub_epi32(columns, _mm512_slli_epi32(high, 1))));
      }
    }
  }
};

// 32 zmm registers: the sums of a tile (one vector each for int16's windows and sign, two else), its words,
// and the tables of a group.
const LookupKernels kLookup =
    lookup_kernels({kExactTableBytes, 2, build_exact, run_tile<ExactBlocks, 4, 2, 0>},
                   {kInt16TableBytes, 4, build_int16, run_tile<Int16Blocks, 4, 2, 2>},
                   {kInt16TableBytes, 4, build_int8, run_tile<Int16Blocks, 4, 2, 2>},
                   {kSignTableBytes, 4, build_sign, run_tile<SignBlocks, 4, 4, 4>}, 512 * 1024);
