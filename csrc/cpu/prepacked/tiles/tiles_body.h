// Operands and sums of tiles, over the instructions and vectors of the files before. Include this where
// elementwise_body.h says.

// Bytes of a plane of a chunk.
constexpr int64_t plane_bytes(int64_t words) { return (words + kTileWords - 1) / kTileWords * 64; }

template <int kPlanes>
float build_planes(float* z, int64_t words, char* operand) {
  const Magnitudes bounds = magnitudes(z, words);
  ChunkScale scale = chunk_scale(
      kPlanes == 2 ? kInt8x2Limit : kInt8Limit,
      kPlanes == 2 && bounds.most < kLeastInt8x2Bound ? kLeastInt8x2Bound : bounds.most, bounds.total);
  const int64_t bytes = plane_bytes(words);
  int32_t sums[2];
  round_to_planes<kPlanes>(z, words, scale.factor, bytes, operand, sums);
  for (int p = 0; p < kPlanes; ++p) store_sums(64 * sums[p], operand + kPlanes * bytes + p * 64);
  return scale.unit * 0x1p-6f;
}

// Signs of 32 rows of a chunk as bytes: tiles of the lower rows, tiles of the upper ones.
struct Panel {
  static constexpr int64_t kMostTiles = (kChunkWords + kTileWords - 1) / kTileWords;
  static constexpr int64_t kTileBytes = 1024;
  alignas(64) char lower[kMostTiles * kTileBytes], upper[kMostTiles * kTileBytes];
};

// A block of 32 rows of a SignTile.
struct BlockSigns {
  const char* data;
  int64_t step;   // bytes between words
  int64_t words;  // even
  int64_t ahead;  // bytes to what will be read later
};

// Operands of up to 32 rows of activations, in one tile or two: of 16 tokens both planes, or of 32 tokens
// one.
struct Operands {
  const char *first, *second;  // their planes
  const char *first_sums, *second_sums;
  int64_t stride;
};

using Products = int32_t[16][16];

// Expands word i of a step, of which `left` words are left, to where the step's tiles are.
[[gnu::always_inline]] inline void expand_word(const Expander& expander, const BlockSigns& signs, int64_t i,
                                               int64_t left, char* lower, char* upper) {
  if (i >= left) return;
  prefetch(signs.data + i * signs.step + signs.ahead);
  expander.expand(signs.data + i * signs.step, lower + i * 256, upper + i * 256);
}

// Sums of a block's rows for kTiles tiles of activations, into products[0 .. 2 kTiles - 1]: lower rows, then
// upper ones, of each. With kExpand, the panel is filled on the way, one step before it is read: vector
// instructions work while tiles are multiplied. What all steps need is in registers, as a step has many loads
// already.
template <int kTiles, bool kExpand>
void multiply(const BlockSigns& block, const Operands& operands, Panel* panel, Products* products) {
  Expander expander;  // not const, which would keep it in memory
  BlockSigns signs = block;
  const char *first = operands.first, *second = operands.second;
  const int64_t stride = operands.stride, steps = (signs.words + kTileWords - 1) / kTileWords;
  char *lower = panel->lower, *upper = panel->upper;  // of the step that is multiplied
  int64_t left = signs.words;                         // words that are not expanded
  if constexpr (kExpand) {
    for (int64_t i = 0; i < kTileWords; ++i) expand_word(expander, signs, i, left, lower, upper);
    signs.data += kTileWords * signs.step;
    left -= kTileWords;
  }
  load_tile<0>(operands.first_sums, stride);
  load_tile<1>(operands.first_sums, stride);
  if constexpr (kTiles == 2) {
    load_tile<2>(operands.second_sums, stride);
    load_tile<3>(operands.second_sums, stride);
  }
  for (int64_t k = 0; k < steps; ++k) {
    char *next_lower = lower + Panel::kTileBytes, *next_upper = upper + Panel::kTileBytes;
    load_tile<6>(lower, 64);
    load_tile<4>(first, stride);
    if constexpr (kExpand) expand_word(expander, signs, 0, left, next_lower, next_upper);
    add_products<0, 4, 6>();
    load_tile<7>(upper, 64);
    if constexpr (kExpand) expand_word(expander, signs, 1, left, next_lower, next_upper);
    add_products<1, 4, 7>();
    if constexpr (kTiles == 2) load_tile<5>(second, stride);
    if constexpr (kExpand) expand_word(expander, signs, 2, left, next_lower, next_upper);
    if constexpr (kTiles == 2) add_products<2, 5, 6>();
    if constexpr (kExpand) expand_word(expander, signs, 3, left, next_lower, next_upper);
    if constexpr (kTiles == 2) add_products<3, 5, 7>();
    signs.data += kTileWords * signs.step;
    left -= kTileWords;
    first += 64;
    second += 64;
    lower = next_lower;
    upper = next_upper;
  }
  store_tile<0>(products[0], 64);
  store_tile<1>(products[1], 64);
  if constexpr (kTiles == 2) {
    store_tile<2>(products[2], 64);
    store_tile<3>(products[3], 64);
  }
}

template <int kPlanes>
void sum_tiles(const SignTile& tile, const Tables& tables, const RowSums& out) {
  constexpr int64_t kGroupTokens = kPlanes == 2 ? kTileTokens : 2 * kTileTokens;
  Panel panel;
  alignas(64) Products products[4];
  const int64_t bytes = plane_bytes(tile.words);
  if (tile.words % kTileWords != 0) {
    // What the last words of a step would fill meets zeros, but must be there.
    std::memset(panel.lower + (bytes / 64 - 1) * Panel::kTileBytes, 0, Panel::kTileBytes);
    std::memset(panel.upper + (bytes / 64 - 1) * Panel::kTileBytes, 0, Panel::kTileBytes);
  }
  for (int64_t block = 0; block < tile.blocks; ++block) {
    const int64_t step = tile.blocks * kBlockBytes;
    const BlockSigns signs = {tile.data + block * kBlockBytes, step, tile.words, tile.words * step};
    for (int64_t token = 0; token < tables.tokens; token += kGroupTokens) {
      const int64_t tokens = tables.tokens - token < kGroupTokens ? tables.tokens - token : kGroupTokens;
      const char* first = tables.data + token * tables.stride;
      const char* second = kPlanes == 2 ? first + bytes : first + kTileTokens * tables.stride;
      const Operands operands = {first, second, first + kPlanes * bytes,
                                 kPlanes == 2 ? first + kPlanes * bytes + 64 : second + bytes, tables.stride};
      const bool both = kPlanes == 2 || tokens > kTileTokens;
      if (token == 0)
        both ? multiply<2, true>(signs, operands, &panel, products)
             : multiply<1, true>(signs, operands, &panel, products);
      else
        both ? multiply<2, false>(signs, operands, &panel, products)
             : multiply<1, false>(signs, operands, &panel, products);
      for (int64_t t = 0; t < tokens; ++t) {
        const Products* own = products + (kPlanes == 1 ? t / kTileTokens * 2 : 0);
        float* rows = out.data + (token + t) * out.stride + block * kBlockRows;
        const float unit = tables.scales[token + t];
        for (int half = 0; half < 2; ++half)
          finish_rows<kPlanes>(own[half][t % kTileTokens],
                               own[half + (kPlanes == 2 ? 2 : 0)][t % kTileTokens], unit, out.add,
                               rows + half * (kBlockRows / 2));
      }
    }
  }
}

// The calling thread's configuration is kept, because others may rely on theirs: libraries set it once for
// many calls.
void enter_tiles(char* saved) {
  TileConfig own = {};
  store_config(&own);
  std::memcpy(saved, &own, sizeof own);
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.columns[tile] = 64;
    config.rows[tile] = 16;
  }
  load_config(config);
}

void leave_tiles(const char* saved) {
  TileConfig own;
  std::memcpy(&own, saved, sizeof own);
  if (own.palette != 0)
    load_config(own);
  else
    release_tiles();
}

template <int kPlanes>
constexpr LookupMode tile_mode() {
  return {kPlanes * 16, 2 * kTileTokens, build_planes<kPlanes>, sum_tiles<kPlanes>, kPlanes,
          enter_tiles,  leave_tiles};
}
