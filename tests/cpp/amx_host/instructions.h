// csrc/cpu/prepacked/tiles/instructions.h on arrays. What a processor refuses ends the program.

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t columns[16];
  uint8_t rows[16];
};

inline void require_tiles(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}

inline void release_tiles() {
  const int64_t products = amx_host::tiles.products;
  amx_host::tiles = {};
  amx_host::tiles.products = products;
}
inline void store_config(TileConfig* config) { std::memcpy(config, amx_host::tiles.config, 64); }
inline void load_config(const TileConfig& config) {
  amx_host::Tiles& tiles = amx_host::tiles;
  release_tiles();
  require_tiles(config.palette == 1 && config.start_row == 0, "the palette must be 1 and the start row 0");
  for (const uint8_t byte : config.reserved) require_tiles(byte == 0, "reserved bytes must be 0");
  for (int i = 0; i < 16; ++i) {
    require_tiles(i < 8 || (config.rows[i] == 0 && config.columns[i] == 0), "there are 8 tiles");
    require_tiles(config.rows[i] <= 16 && config.columns[i] <= 64, "a tile has 16 rows of 64 bytes at most");
  }
  std::memcpy(tiles.config, &config, 64);
  tiles.palette = config.palette;
  for (int i = 0; i < 8; ++i) {
    tiles.rows[i] = config.rows[i];
    tiles.columns[i] = config.columns[i];
  }
}

template <int kTile>
inline void load_tile(const void* rows, int64_t stride) {
  amx_host::Tiles& tiles = amx_host::tiles;
  require_tiles(tiles.palette != 0, "loaded without a configuration");
  for (int row = 0; row < tiles.rows[kTile]; ++row)
    std::memcpy(tiles.data[kTile][row], static_cast<const char*>(rows) + row * stride, tiles.columns[kTile]);
}

template <int kTile>
inline void store_tile(void* rows, int64_t stride) {
  const amx_host::Tiles& tiles = amx_host::tiles;
  require_tiles(tiles.palette != 0, "stored without a configuration");
  for (int row = 0; row < tiles.rows[kTile]; ++row)
    std::memcpy(static_cast<char*>(rows) + row * stride, tiles.data[kTile][row], tiles.columns[kTile]);
}

template <int kSum, int kA, int kB>
inline void add_products() {
  amx_host::Tiles& tiles = amx_host::tiles;
  require_tiles(tiles.palette != 0, "multiplied without a configuration");
  require_tiles(tiles.columns[kA] == 4 * tiles.rows[kB] && tiles.rows[kA] == tiles.rows[kSum] &&
                    tiles.columns[kB] == tiles.columns[kSum],
                "the sizes of the operands do not match");
  ++tiles.products;
  for (int m = 0; m < tiles.rows[kA]; ++m)
    for (int n = 0; n < tiles.columns[kB] / 4; ++n) {
      uint32_t sum;  // wraps around, as rows that nobody reads may
      std::memcpy(&sum, tiles.data[kSum][m] + 4 * n, 4);
      for (int k = 0; k < tiles.rows[kB]; ++k)
        for (int j = 0; j < 4; ++j)
          sum += static_cast<uint32_t>(static_cast<int8_t>(tiles.data[kA][m][4 * k + j]) *
                                       static_cast<int8_t>(tiles.data[kB][k][4 * n + j]));
      std::memcpy(tiles.data[kSum][m] + 4 * n, &sum, 4);
    }
}
