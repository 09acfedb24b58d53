// The lookup kernels in plain C++. Include this where elementwise_body.h says.

inline float signed_sum(const float* z, int64_t entry) {
  float sum = entry & 1 ? -z[0] : z[0];
  for (int i = 1; i < kGroupCols; ++i) sum += (entry >> i) & 1 ? -z[i] : z[i];
  return sum;
}

float build_exact(float* z, int64_t words, char* tables) {
  for (int64_t g = 0; g < words * kWordGroups; ++g, z += kGroupCols)
    for (int64_t e = 0; e < kTableEntries; ++e, tables += 4) {
      const float sum = signed_sum(z, e);
      std::memcpy(tables, &sum, 4);
    }
  return 1.0f;
}

// To the nearest integer, ties to even, for magnitudes below 2^22.
inline float round_even(float value) {
  constexpr float kShift = 0x1.8p23f;
  return (value + kShift) - kShift;
}

inline void build_words(const float* y, int64_t words, char* tables) {
  for (int64_t g = 0; g < words * kWordGroups; ++g, y += kGroupCols)
    for (int64_t e = 0; e < kTableEntries; ++e, tables += 2) {
      const float sum = round_even(signed_sum(y, e));
      const int16_t entry = sum == sum ? static_cast<int16_t>(sum) : int16_t{0};
      std::memcpy(tables, &entry, 2);
    }
}

float build_int16(float* z, int64_t words, char* tables) {
  float most[kLanes] = {}, total[kLanes] = {};
  for (int64_t w = 0; w < words; w += kWindowWords)
    for (int l = 0; l < kWordCols; ++l) {
      const float* column = z + w * kWordCols + l;
      const float sum = __builtin_fabsf(column[0]) + __builtin_fabsf(column[kWordCols]);
      if (sum > most[l]) most[l] = sum;
      total[l] += sum;
    }
  const ChunkScale scale = chunk_scale(kInt16Limit, tree_sum(most), tree_sum(total));
  for (int64_t i = 0; i < words * kWordCols; ++i) z[i] *= scale.factor;
  build_words(z, words, tables);
  return scale.unit;
}

float build_int8(float* z, int64_t words, char* tables) {
  float most = 0.0f, total[kLanes] = {};
  for (int64_t i = 0; i < words * kWordCols; ++i) {
    const float value = __builtin_fabsf(z[i]);
    if (value > most) most = value;
    total[i % kWordCols] += value;
  }
  const ChunkScale scale = chunk_scale(kInt8Limit, most, tree_sum(total));
  for (int64_t i = 0; i < words * kWordCols; ++i) z[i] = round_even(z[i] * scale.factor);
  build_words(z, words, tables);
  return scale.unit;
}

float build_sign(float* z, int64_t words, char* tables) {
  for (int64_t w = 0; w < words; ++w) {
    uint16_t bits = 0;
    for (int l = 0; l < kWordCols; ++l)
      bits = static_cast<uint16_t>(bits | (z[w * kWordCols + l] < 0.0f) << l);
    std::memcpy(tables + 2 * w, &bits, 2);
  }
  return 1.0f;
}

// The words of a block by lane, and the rows of these.
struct BlockWords {
  uint16_t lanes[kBlockRows];
  explicit BlockWords(const char* data) {
    if (!kBytePlanes) {
      std::memcpy(lanes, data, sizeof lanes);
      return;
    }
    for (int64_t row = 0; row < kBlockRows; ++row) lanes[row] = load_word(data + row_offset(row));
  }
};
inline int64_t row_of_lane(int64_t lane) {
  return kBytePlanes ? lane : lane / 2 + (lane % 2) * (kBlockRows / 2);
}

inline void finish_block(const RowSums& out, int64_t token, int64_t block, const float* lanes) {
  float* target = out.data + token * out.stride + block * kBlockRows;
  for (int64_t lane = 0; lane < kBlockRows; ++lane) {
    float& row = target[row_of_lane(lane)];
    row = out.add ? row + lanes[lane] : lanes[lane];
  }
}

// Adds up the table entries of a block's rows, by lane.
template <typename Entry, typename Sum>
inline void sum_entries(const SignTile& tile, int64_t block, const char* table, Sum* sums) {
  for (int64_t w = 0; w < tile.words; ++w) {
    const BlockWords words(tile.data + (w * tile.blocks + block) * kBlockBytes);
    for (int g = 0; g < kWordGroups; ++g, table += kTableEntries * sizeof(Entry)) {
      Entry entries[kTableEntries];
      std::memcpy(entries, table, sizeof entries);
      for (int64_t lane = 0; lane < kBlockRows; ++lane)
        sums[lane] += entries[(words.lanes[lane] >> (g * kGroupCols)) & (kTableEntries - 1)];
    }
  }
}

template <int kBlocks, int kTokens>
struct ExactBlocks {
  static_assert(kBlocks == 1 && kTokens == 1, "one block, one token");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    float sums[kBlockRows] = {};
    sum_entries<float>(tile, block, tables.data + token * tables.stride, sums);
    finish_block(out, token, block, sums);
  }
};

template <int kBlocks, int kTokens>
struct Int16Blocks {
  static_assert(kBlocks == 1 && kTokens == 1, "one block, one token");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    int32_t sums[kBlockRows] = {};
    sum_entries<int16_t>(tile, block, tables.data + token * tables.stride, sums);
    float scaled[kBlockRows];
    for (int64_t lane = 0; lane < kBlockRows; ++lane)
      scaled[lane] = tables.scales[token] * static_cast<float>(sums[lane]);
    finish_block(out, token, block, scaled);
  }
};

template <int kBlocks, int kTokens>
struct SignBlocks {
  static_assert(kBlocks == 1 && kTokens == 1, "one block, one token");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    int32_t mismatches[kBlockRows] = {};
    for (int64_t w = 0; w < tile.words; ++w) {
      const BlockWords words(tile.data + (w * tile.blocks + block) * kBlockBytes);
      uint16_t signs;
      std::memcpy(&signs, tables.data + token * tables.stride + w * kSignTableBytes, 2);
      for (int64_t lane = 0; lane < kBlockRows; ++lane)
        mismatches[lane] += __builtin_popcount(static_cast<unsigned>(words.lanes[lane] ^ signs));
    }
    float counts[kBlockRows];
    for (int64_t lane = 0; lane < kBlockRows; ++lane)
      counts[lane] = static_cast<float>(static_cast<int32_t>(tables.columns) - 2 * mismatches[lane]);
    finish_block(out, token, block, counts);
  }
};

const LookupKernels kLookup =
    lookup_kernels({kExactTableBytes, 1, build_exact, run_tile<ExactBlocks, 1, 0, 0>},
                   {kInt16TableBytes, 1, build_int16, run_tile<Int16Blocks, 1, 0, 0>},
                   {kInt16TableBytes, 1, build_int8, run_tile<Int16Blocks, 1, 0, 0>},
                   {kSignTableBytes, 1, build_sign, run_tile<SignBlocks, 1, 0, 0>}, 32 * 1024);
