// The lookup kernels for AVX2. Include this where elementwise_body.h says.
//
// A byte shuffle looks up 16 entries, so only those with bit 4 clear are stored; the others are their
// negatives: entry(e) = -entry(~e), exactly. Tables lie as planes of bytes, 16 bytes each: of an int16 entry
// the low and the high bytes, of a float four. One shuffle for each plane serves the 32 rows of a block,
// whose indices are bytes; interleaving the planes makes entries of them.

// The 16 entries of a group, in the order of lookup.h's additions.
struct GroupEntries {
  __m256 lower, upper;
  explicit GroupEntries(const float* z) {
    const __m256 sign0 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const __m256 sign1 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256 sign2 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    __m256 sum = _mm256_mul_ps(sign0, _mm256_broadcast_ss(z));
    sum = _mm256_fmadd_ps(sign1, _mm256_broadcast_ss(z + 1), sum);
    sum = _mm256_fmadd_ps(sign2, _mm256_broadcast_ss(z + 2), sum);
    const __m256 third = _mm256_broadcast_ss(z + 3), fourth = _mm256_broadcast_ss(z + 4);
    lower = _mm256_add_ps(_mm256_add_ps(sum, third), fourth);
    upper = _mm256_add_ps(_mm256_sub_ps(sum, third), fourth);
  }
};

float build_exact(float* z, int64_t words, char* tables) {
  const __m256i gather =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t g = 0; g < words * kWordGroups; ++g, z += kGroupCols, tables += 64) {
    const GroupEntries entries(z);
    // Four bytes of each plane in every 128-bit half; entries 0 to 3 and 4 to 7, 8 to 11 and 12 to 15.
    const __m256i lower = _mm256_shuffle_epi8(_mm256_castps_si256(entries.lower), gather);
    const __m256i upper = _mm256_shuffle_epi8(_mm256_castps_si256(entries.upper), gather);
    const __m256i halves0 = _mm256_permute2x128_si256(lower, upper, 0x20);
    const __m256i halves1 = _mm256_permute2x128_si256(lower, upper, 0x31);
    const __m256i planes01 = _mm256_unpacklo_epi32(halves0, halves1);
    const __m256i planes23 = _mm256_unpackhi_epi32(halves0, halves1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables),
                        _mm256_permute4x64_epi64(planes01, _MM_SHUFFLE(3, 1, 2, 0)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables + 32),
                        _mm256_permute4x64_epi64(planes23, _MM_SHUFFLE(3, 1, 2, 0)));
  }
  return 1.0f;
}

void build_words(const float* y, int64_t words, char* tables) {
  const __m256i low_byte = _mm256_set1_epi16(0xFF);
  for (int64_t g = 0; g < words * kWordGroups; ++g, y += kGroupCols, tables += 32) {
    const GroupEntries sums(y);
    const __m256i lower = _mm256_cvtps_epi32(sums.lower), upper = _mm256_cvtps_epi32(sums.upper);
    // packs works within 128-bit halves; put the four quarters back in order.
    const __m256i entries =
        _mm256_permute4x64_epi64(_mm256_packs_epi32(lower, upper), _MM_SHUFFLE(3, 1, 2, 0));
    const __m256i bytes =
        _mm256_packus_epi16(_mm256_and_si256(entries, low_byte), _mm256_srli_epi16(entries, 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables),
                        _mm256_permute4x64_epi64(bytes, _MM_SHUFFLE(3, 1, 2, 0)));
  }
}

Vec word_columns(const float* z) {
  const Vec columns = Vec::load(z);
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX));
  const __m256 high = _mm256_blend_ps(columns.high, _mm256_setzero_ps(), 0x80);
  return {_mm256_and_ps(columns.low, mask), _mm256_and_ps(high, mask)};
}

Vec rounded(const Vec& v) {
  return {_mm256_round_ps(v.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(v.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
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

// Both halves of a block's words. Byte 2 j of what is made of them belongs to the row of 16-bit lane j of the
// first half, byte 2 j + 1 to that of the second.
struct BlockWords {
  __m256i first, second;
  explicit BlockWords(const char* data) : first(load_words(data, 0)), second(load_words(data, 1)) {}
};

// Where the entries of a group are: the index among the 16 stored ones, and all bits set where it is negated.
struct GroupIndex {
  __m256i index, flip;
};

template <int kGroup>
inline GroupIndex group_index(const BlockWords& words) {
  constexpr int kBit = kGroup * kGroupCols;
  const __m256i odd_bytes = _mm256_set1_epi16(static_cast<int16_t>(0xFF00)), five_bits = _mm256_set1_epi8(31);
  const __m256i first = kBit == 0 ? words.first : _mm256_srli_epi16(words.first, kBit);
  const __m256i second = kBit <= 8 ? _mm256_slli_epi16(words.second, kBit <= 8 ? 8 - kBit : 0)
                                   : _mm256_srli_epi16(words.second, kBit <= 8 ? 0 : kBit - 8);
  const __m256i entry = _mm256_and_si256(_mm256_blendv_epi8(first, second, odd_bytes), five_bits);
  // Of an entry and its complement, the one below 16.
  return {_mm256_min_epu8(entry, _mm256_xor_si256(entry, five_bits)),
          _mm256_cmpgt_epi8(entry, _mm256_set1_epi8(15))};
}

inline __m256i load_plane(const char* table) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}

// Sums of 8 rows each: 32-bit lane l of the low half of part i belongs to row i + 8 l, of the high half to
// row 4 + i + 8 l.
struct ExactSums {
  __m256 part[4];
};

template <int kGroup, int kTokens>
inline void exact_group(const BlockWords& words, const char* tables, int64_t stride, ExactSums* sums) {
  const GroupIndex at = group_index<kGroup>(words);
  const __m256i sign = _mm256_and_si256(at.flip, _mm256_set1_epi8(static_cast<char>(0x80)));
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) {
    const char* table = tables + t * stride + kGroup * 64;
    const __m256i byte0 = _mm256_shuffle_epi8(load_plane(table), at.index);
    const __m256i byte1 = _mm256_shuffle_epi8(load_plane(table + 16), at.index);
    const __m256i byte2 = _mm256_shuffle_epi8(load_plane(table + 32), at.index);
    const __m256i byte3 = _mm256_xor_si256(_mm256_shuffle_epi8(load_plane(table + 48), at.index), sign);
    const __m256i low0 = _mm256_unpacklo_epi8(byte0, byte1), low1 = _mm256_unpackhi_epi8(byte0, byte1);
    const __m256i high0 = _mm256_unpacklo_epi8(byte2, byte3), high1 = _mm256_unpackhi_epi8(byte2, byte3);
    const __m256i entries[4] = {_mm256_unpacklo_epi16(low0, high0), _mm256_unpackhi_epi16(low0, high0),
                                _mm256_unpacklo_epi16(low1, high1), _mm256_unpackhi_epi16(low1, high1)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      sums[t].part[i] = _mm256_add_ps(sums[t].part[i], _mm256_castsi256_ps(entries[i]));
  }
}

template <int kBlocks, int kTokens>
struct ExactBlocks {
  static_assert(kBlocks == 1, "one block at a time");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    ExactSums sums[kTokens];
    for (int t = 0; t < kTokens; ++t)
      for (__m256& part : sums[t].part) part = _mm256_setzero_ps();
    const char* data = tile.data + block * kBlockBytes;
    const char* table = tables.data + token * tables.stride;
    for (int64_t w = 0; w < tile.words; ++w) {
      const BlockWords words(data);
      exact_group<0, kTokens>(words, table, tables.stride, sums);
      exact_group<1, kTokens>(words, table, tables.stride, sums);
      exact_group<2, kTokens>(words, table, tables.stride, sums);
      data += tile.blocks * kBlockBytes;
      table += kExactTableBytes / 2;
    }
    for (int t = 0; t < kTokens; ++t) {
      // Rows i + 8 l into lanes i: each half transposed.
      const __m256* part = sums[t].part;
      const __m256 a = _mm256_unpacklo_ps(part[0], part[1]), b = _mm256_unpackhi_ps(part[0], part[1]);
      const __m256 c = _mm256_unpacklo_ps(part[2], part[3]), d = _mm256_unpackhi_ps(part[2], part[3]);
      finish_block(out, token + t, block, _mm256_shuffle_ps(a, c, _MM_SHUFFLE(1, 0, 1, 0)),
                   _mm256_shuffle_ps(b, d, _MM_SHUFFLE(1, 0, 1, 0)),
                   _mm256_shuffle_ps(a, c, _MM_SHUFFLE(3, 2, 3, 2)),
                   _mm256_shuffle_ps(b, d, _MM_SHUFFLE(3, 2, 3, 2)));
    }
  }
};

// Sums of a window: 16-bit lane 4 l + j of the low half of part i belongs to row 2 i + l + 8 j, of the high
// half to row 4 + 2 i + l + 8 j.
struct WindowSums {
  __m256i part[2];
};

// A negated entry is added as its complement, one too little; `flips` counts them.
template <int kGroup, int kTokens>
inline void int16_group(const BlockWords& words, const char* tables, int64_t stride, __m256i* flips,
                        WindowSums* sums) {
  const GroupIndex at = group_index<kGroup>(words);
  *flips = _mm256_sub_epi8(*flips, at.flip);
#pragma GCC unroll 2
  for (int t = 0; t < kTokens; ++t) {
    const char* table = tables + t * stride + kGroup * 32;
    const __m256i low = _mm256_xor_si256(_mm256_shuffle_epi8(load_plane(table), at.index), at.flip);
    const __m256i high = _mm256_xor_si256(_mm256_shuffle_epi8(load_plane(table + 16), at.index), at.flip);
    sums[t].part[0] = _mm256_add_epi16(sums[t].part[0], _mm256_unpacklo_epi8(low, high));
    sums[t].part[1] = _mm256_add_epi16(sums[t].part[1], _mm256_unpackhi_epi8(low, high));
  }
}

// Adds 16-bit lanes to 32-bit ones: the even lanes of part i to sums[i], the odd ones to sums[2 + i].
inline void widen(const __m256i (&part)[2], __m256i (&sums)[4]) {
  const __m256i even = _mm256_set1_epi32(1), odd = _mm256_set1_epi32(1 << 16);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(part[i], even));
    sums[2 + i] = _mm256_add_epi32(sums[2 + i], _mm256_madd_epi16(part[i], odd));
  }
}

template <int kBlocks, int kTokens>
struct Int16Blocks {
  static_assert(kBlocks == 1, "one block at a time");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    // The complements of a window's entries are up to 6 too little in all: starting in the middle, their sum
    // stays in 16 bits whenever that of the entries does, with the room that kInt16Limit leaves.
    constexpr int kStart = kWindowWords * kWordGroups / 2;
    const __m256i start = _mm256_set1_epi16(kStart);
    __m256i sums[kTokens][4];
    for (int t = 0; t < kTokens; ++t)
      for (__m256i& sum : sums[t]) sum = _mm256_setzero_si256();
    __m256i flips = _mm256_setzero_si256();  // a chunk has fewer groups than a byte counts
    static_assert(kChunkWords * kWordGroups < 256);
    const char* data = tile.data + block * kBlockBytes;
    const char* table = tables.data + token * tables.stride;
    const int64_t step = tile.blocks * kBlockBytes;
    for (int64_t w = 0; w < tile.words; w += kWindowWords) {
      WindowSums window[kTokens];
      for (int t = 0; t < kTokens; ++t) window[t].part[0] = window[t].part[1] = start;
#pragma GCC unroll 2
      for (int i = 0; i < kWindowWords; ++i) {
        const BlockWords words(data + i * step);
        const char* entries = table + i * (kInt16TableBytes / 2);
        int16_group<0, kTokens>(words, entries, tables.stride, &flips, window);
        int16_group<1, kTokens>(words, entries, tables.stride, &flips, window);
        int16_group<2, kTokens>(words, entries, tables.stride, &flips, window);
      }
      for (int t = 0; t < kTokens; ++t) widen(window[t].part, sums[t]);
      data += kWindowWords * step;
      table += kWindowWords * kInt16TableBytes / 2;
    }
    // What the sums lack: a one for each complement, less what every window started with.
    const __m256i zero = _mm256_setzero_si256();
    const __m256i counts[2] = {_mm256_unpacklo_epi8(flips, zero), _mm256_unpackhi_epi8(flips, zero)};
    const __m256i started = _mm256_set1_epi32(static_cast<int>(tile.words / kWindowWords * kStart));
    for (int t = 0; t < kTokens; ++t) {
      widen(counts, sums[t]);
      const __m256 scale = _mm256_set1_ps(tables.scales[token + t]);
      __m256 parts[4];
      for (int i = 0; i < 4; ++i)
        parts[i] = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_sub_epi32(sums[t][i], started)));
      // Lanes of parts 0 and 1: rows 2 i, 2 i + 16, 2 i + 1, 2 i + 17; of parts 2 and 3 rows 8 further.
      finish_block(out, token + t, block, _mm256_shuffle_ps(parts[0], parts[1], _MM_SHUFFLE(2, 0, 2, 0)),
                   _mm256_shuffle_ps(parts[0], parts[1], _MM_SHUFFLE(3, 1, 3, 1)),
                   _mm256_shuffle_ps(parts[2], parts[3], _MM_SHUFFLE(2, 0, 2, 0)),
                   _mm256_shuffle_ps(parts[2], parts[3], _MM_SHUFFLE(3, 1, 3, 1)));
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

const LookupKernels kLookup =
    lookup_kernels({kExactTableBytes / 2, 2, build_exact, run_tile<ExactBlocks, 1, 1, 0>},
                   {kInt16TableBytes / 2, 2, build_int16, run_tile<Int16Blocks, 1, 1, 0>},
                   {kInt16TableBytes / 2, 2, build_int8, run_tile<Int16Blocks, 1, 1, 0>},
                   {kSignTableBytes, 2, build_sign, run_tile<SignBlocks, 1, 1, 0>}, 128 * 1024);
