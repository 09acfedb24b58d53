// The lookup kernels for NEON. Include this where elementwise_body.h says.
//
// A byte lookup in two registers has the 32 entries of a group, so tables lie as planes of bytes, 32 bytes
// each: of a 16-bit entry the low and the high bytes, of a float four. One lookup serves 16 rows.
//
// 16-bit entries are stored without a sign: each has the largest entry of its group added. As the sums of a
// window fit 16 bits with a sign, those of what is stored fit without one, and the sums of its high bytes fit
// a byte. So high bytes are added as bytes, window by window, and low ones in 16 bits, which hold those of a
// chunk. What was added is stored behind the tables of a chunk, and taken off once.

static_assert(kBytePlanes, "these kernels read byte planes (word.h)");

constexpr int64_t kPlaneBytes = kTableEntries;
constexpr int64_t kAddedBytes = 16;  // of a word; the first four bytes of a chunk's are used
constexpr int64_t kNeonInt16TableBytes = kInt16TableBytes + kAddedBytes;
static_assert(kChunkWords * kWordGroups * 255 < 65536, "the low bytes of a chunk are summed in 16 bits");

// The 32 entries of a group, in the order of lookup.h's additions: four in each vector.
struct GroupEntries {
  float32x4_t four[8];
  explicit GroupEntries(const float* z) {
    const float sign0[4] = {1, -1, 1, -1}, sign1[4] = {1, 1, -1, -1};
    four[0] = vaddq_f32(vmulq_n_f32(vld1q_f32(sign0), z[0]), vmulq_n_f32(vld1q_f32(sign1), z[1]));
    for (int column = 2, count = 1; column < kGroupCols; ++column, count *= 2) {
      const float32x4_t value = vdupq_n_f32(z[column]);
      for (int i = 0; i < count; ++i) {
        four[count + i] = vsubq_f32(four[i], value);
        four[i] = vaddq_f32(four[i], value);
      }
    }
  }
};

float build_exact(float* z, int64_t words, char* tables) {
  for (int64_t g = 0; g < words * kWordGroups; ++g, z += kGroupCols, tables += 4 * kPlaneBytes) {
    const GroupEntries entries(z);
    for (int half = 0; half < 2; ++half) {
      uint16x8_t words16[4];
      for (int i = 0; i < 4; ++i) words16[i] = vreinterpretq_u16_f32(entries.four[4 * half + i]);
      for (int upper = 0; upper < 2; ++upper) {
        const auto halves = [&](int i) {
          return vreinterpretq_u8_u16(upper ? vuzp2q_u16(words16[i], words16[i + 1])
                                            : vuzp1q_u16(words16[i], words16[i + 1]));
        };
        uint8_t* plane = reinterpret_cast<uint8_t*>(tables) + 2 * upper * kPlaneBytes + 16 * half;
        vst1q_u8(plane, vuzp1q_u8(halves(0), halves(2)));
        vst1q_u8(plane + kPlaneBytes, vuzp2q_u8(halves(0), halves(2)));
      }
    }
  }
  return 1.0f;
}

void build_words(const float* y, int64_t words, char* tables) {
  int32_t added = 0;
  for (int64_t g = 0; g < words * kWordGroups; ++g, y += kGroupCols, tables += 2 * kPlaneBytes) {
    const GroupEntries sums(y);
    int16x8_t entries[4];
    for (int i = 0; i < 4; ++i)
      entries[i] = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(sums.four[2 * i])),
                                vqmovn_s32(vcvtnq_s32_f32(sums.four[2 * i + 1])));
    const int16_t largest =
        vmaxvq_s16(vmaxq_s16(vmaxq_s16(entries[0], entries[1]), vmaxq_s16(entries[2], entries[3])));
    added += largest;
    for (int half = 0; half < 2; ++half) {
      const auto stored = [&](int i) {
        return vreinterpretq_u8_s16(vaddq_s16(entries[2 * half + i], vdupq_n_s16(largest)));
      };
      uint8_t* plane = reinterpret_cast<uint8_t*>(tables) + 16 * half;
      vst1q_u8(plane, vuzp1q_u8(stored(0), stored(1)));
      vst1q_u8(plane + kPlaneBytes, vuzp2q_u8(stored(0), stored(1)));
    }
  }
  std::memcpy(tables, &added, 4);
}

Vec word_columns(const float* z) {
  Vec columns = Vec::load(z);
  for (float32x4_t& part : columns.part) part = vabsq_f32(part);
  columns.part[3] = vsetq_lane_f32(0.0f, columns.part[3], 3);
  return columns;
}

Vec rounded(const Vec& v) {
  Vec result;
  for (int i = 0; i < 4; ++i) result.part[i] = vrndnq_f32(v.part[i]);
  return result;
}

// The signs of a word as its planes have them.
float build_sign(float* z, int64_t words, char* tables) {
  for (int64_t w = 0; w < words; ++w) {
    const Vec columns = Vec::load(z + w * kWordCols);
    const uint16_t weights[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const auto byte = [&](int i) {
      const uint16x8_t negative = vuzp1q_u16(vreinterpretq_u16_u32(vcltzq_f32(columns.part[i])),
                                             vreinterpretq_u16_u32(vcltzq_f32(columns.part[i + 1])));
      return static_cast<unsigned>(vaddvq_u16(vandq_u16(negative, vld1q_u16(weights))));
    };
    const unsigned bits = (byte(0) | byte(2) << 8) & ((1u << kWordCols) - 1);
    const uint16_t planes = to_planes(static_cast<uint16_t>(bits));
    std::memcpy(tables + w * kSignTableBytes, &planes, 2);
  }
  return 1.0f;
}

// The indices of 16 rows in the three groups of a word.
struct GroupIndices {
  uint8x16_t group[kWordGroups];
  GroupIndices(const char* data, int half) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(data) + 16 * half;
    uint8x16_t byte0 = vld1q_u8(bytes);
    const uint8x16_t byte1 = vld1q_u8(bytes + kBlockRows);
    group[0] = vshrq_n_u8(byte0, 3);
    // After the shift, so that the insertion may overwrite byte 0.
    __asm__("" : "+w"(byte0), "+w"(group[0]));
    group[1] = vandq_u8(vsliq_n_u8(byte0, byte1, 3), vdupq_n_u8(31));
    group[2] = vshrq_n_u8(byte1, 3);
  }
};

inline uint8x16x2_t load_plane(const char* table) {
  return vld1q_u8_x2(reinterpret_cast<const uint8_t*>(table));
}

inline void finish_four(const RowSums& out, int64_t token, int64_t row, float32x4_t sums) {
  float* target = out.data + token * out.stride + row;
  vst1q_f32(target, out.add ? vaddq_f32(vld1q_f32(target), sums) : sums);
}

// Adds the entries of 16 rows.
inline void add_entries(uint8x16_t index, const char* table, float32x4_t* sums) {
  uint8x16_t bytes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    bytes[i] = vqtbl2q_u8(load_plane(table + i * kPlaneBytes), index);
    // Between the instructions: Clang 19 crashes where it sees that shuffles of lookups are shuffles.
    __asm__("" : "+w"(bytes[i]));
  }
  const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(bytes[0], bytes[1]));
  const uint16x8_t low1 = vreinterpretq_u16_u8(vzip2q_u8(bytes[0], bytes[1]));
  const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(bytes[2], bytes[3]));
  const uint16x8_t high1 = vreinterpretq_u16_u8(vzip2q_u8(bytes[2], bytes[3]));
  const uint16x8_t entries[4] = {vzip1q_u16(low0, high0), vzip2q_u16(low0, high0), vzip1q_u16(low1, high1),
                                 vzip2q_u16(low1, high1)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sums[i] = vaddq_f32(sums[i], vreinterpretq_f32_u16(entries[i]));
}

template <int kBlocks, int kTokens>
struct ExactBlocks {
  static_assert(kBlocks == 1 && kTokens == 1, "one block, one token");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    float32x4_t sums[8];
    for (float32x4_t& sum : sums) sum = vdupq_n_f32(0.0f);
    const char* data = tile.data + block * kBlockBytes;
    const char* table = tables.data + token * tables.stride;
    for (int64_t w = 0; w < tile.words; ++w) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const GroupIndices indices(data, half);
#pragma GCC unroll 3
        for (int g = 0; g < kWordGroups; ++g)
          add_entries(indices.group[g], table + g * 4 * kPlaneBytes, sums + 4 * half);
      }
      data += tile.blocks * kBlockBytes;
      table += kExactTableBytes;
    }
    for (int i = 0; i < 8; ++i) finish_four(out, token, block * kBlockRows + 4 * i, sums[i]);
  }
};

// Sums of 16 rows: of low bytes, of high bytes, and of the high bytes of this window.
struct PlaneSums {
  uint16x8_t low[2], high[2];
  uint8x16_t window;

  void add(const uint8x16x2_t& low_plane, const uint8x16x2_t& high_plane, uint8x16_t index, bool first) {
    const uint8x16_t low_bytes = vqtbl2q_u8(low_plane, index), high_bytes = vqtbl2q_u8(high_plane, index);
    add_bytes(low_bytes, low);
    window = first ? high_bytes : vaddq_u8(window, high_bytes);
  }
  void end_window() { add_bytes(window, high); }

  static void add_bytes(uint8x16_t bytes, uint16x8_t* sums) {
    sums[0] = vaddw_u8(sums[0], vget_low_u8(bytes));
    sums[1] = vaddw_high_u8(sums[1], bytes);
  }
};

template <int kGroup>
inline void add_group(const GroupIndices& lower, const GroupIndices& upper, const char* tables, bool first,
                      PlaneSums& lower_sums, PlaneSums& upper_sums) {
  const char* table = tables + kGroup * 2 * kPlaneBytes;
  const uint8x16x2_t low = load_plane(table), high = load_plane(table + kPlaneBytes);
  lower_sums.add(low, high, lower.group[kGroup], first);
  upper_sums.add(low, high, upper.group[kGroup], first);
}

inline void add_word(const char* data, const char* tables, bool first, PlaneSums& lower_sums,
                     PlaneSums& upper_sums) {
  const GroupIndices lower(data, 0), upper(data, 1);
  add_group<0>(lower, upper, tables, first, lower_sums, upper_sums);
  add_group<1>(lower, upper, tables, false, lower_sums, upper_sums);
  add_group<2>(lower, upper, tables, false, lower_sums, upper_sums);
}

inline void finish_planes(const PlaneSums& sums, int32_t added, float scale, const RowSums& out,
                          int64_t token, int64_t row) {
  for (int i = 0; i < 4; ++i) {
    const uint16x8_t low = sums.low[i / 2], high = sums.high[i / 2];
    const uint32x4_t total = i % 2 ? vaddw_high_u16(vshll_high_n_u16(high, 8), low)
                                   : vaddw_u16(vshll_n_u16(vget_low_u16(high), 8), vget_low_u16(low));
    const int32x4_t sum = vsubq_s32(vreinterpretq_s32_u32(total), vdupq_n_s32(added));
    finish_four(out, token, row + 4 * i, vmulq_n_f32(vcvtq_f32_s32(sum), scale));
  }
}

template <int kBlocks, int kTokens>
struct Int16Blocks {
  static_assert(kBlocks == 1 && kTokens == 1, "one block, one token");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    const uint16x8_t zero = vdupq_n_u16(0);
    PlaneSums lower = {{zero, zero}, {zero, zero}, vdupq_n_u8(0)}, upper = lower;
    const char* data = tile.data + block * kBlockBytes;
    const char* table = tables.data + token * tables.stride;
    const int64_t step = tile.blocks * kBlockBytes;
    static_assert(kWindowWords == 2, "a window is unrolled");
    for (int64_t w = 0; w < tile.words; w += kWindowWords) {
      add_word(data, table, true, lower, upper);
      add_word(data + step, table + kInt16TableBytes, false, lower, upper);
      lower.end_window();
      upper.end_window();
      data += kWindowWords * step;
      table += kWindowWords * kInt16TableBytes;
    }
    int32_t added;
    std::memcpy(&added, table, 4);
    finish_planes(lower, added, tables.scales[token], out, token, block * kBlockRows);
    finish_planes(upper, added, tables.scales[token], out, token, block * kBlockRows + 16);
  }
};

template <int kBlocks, int kTokens>
struct SignBlocks {
  static_assert(kBlocks == 1 && kTokens == 1, "one block, one token");
  static void run(const SignTile& tile, int64_t block, const Tables& tables, int64_t token,
                  const RowSums& out) {
    uint16x8_t mismatches[4];
    for (uint16x8_t& sum : mismatches) sum = vdupq_n_u16(0);
    const uint8_t* data = reinterpret_cast<const uint8_t*>(tile.data + block * kBlockBytes);
    const uint8_t* signs = reinterpret_cast<const uint8_t*>(tables.data + token * tables.stride);
    constexpr int64_t kByteWords = 255 / kWordCols;  // whose mismatches a byte counts
    for (int64_t w = 0; w < tile.words;) {
      const int64_t end = w + kByteWords < tile.words ? w + kByteWords : tile.words;
      uint8x16_t counts[2] = {vdupq_n_u8(0), vdupq_n_u8(0)};
      for (; w < end; ++w, data += tile.blocks * kBlockBytes, signs += kSignTableBytes)
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
          const uint8x16_t differ = veorq_u8(vld1q_u8(data + 16 * part), vdupq_n_u8(signs[part / 2]));
          counts[part % 2] = vaddq_u8(counts[part % 2], vcntq_u8(differ));
        }
      for (int half = 0; half < 2; ++half) {
        uint16x8_t* rows = mismatches + 2 * half;
        rows[0] = vaddw_u8(rows[0], vget_low_u8(counts[half]));
        rows[1] = vaddw_high_u8(rows[1], counts[half]);
      }
    }
    const int32x4_t columns = vdupq_n_s32(static_cast<int32_t>(tables.columns));
    for (int i = 0; i < 8; ++i) {
      const uint16x8_t count = mismatches[i / 2];
      const uint32x4_t twice = i % 2 ? vshll_high_n_u16(count, 1) : vshll_n_u16(vget_low_u16(count), 1);
      finish_four(out, token, block * kBlockRows + 4 * i,
                  vcvtq_f32_s32(vsubq_s32(columns, vreinterpretq_s32_u32(twice))));
    }
  }
};

// One token at a time: a second one would share indices, a fifth of the work, and run out of registers. The
// signs of a tile stay in the L1 cache for all four.
const LookupKernels kLookup =
    lookup_kernels({kExactTableBytes, 4, build_exact, run_tile<ExactBlocks, 1, 0, 0>},
                   {kNeonInt16TableBytes, 4, build_int16, run_tile<Int16Blocks, 1, 0, 0>},
                   {kNeonInt16TableBytes, 4, build_int8, run_tile<Int16Blocks, 1, 0, 0>},
                   {kSignTableBytes, 4, build_sign, run_tile<SignBlocks, 1, 0, 0>}, 128 * 1024);
