// The instructions of AMX that tiles_body.h uses. Assembly, because compilers' intrinsics do not say which
// memory they touch: bytes that were just expanded must be in memory before a tile is loaded. Include this
// where elementwise_body.h says. tests/cpp/amx_host has the same on arrays.

// A configuration as the processor stores it: palette, then columns (bytes) and rows of each tile.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t columns[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

inline void store_config(TileConfig* config) { __asm__ volatile("sttilecfg %0" : "=m"(*config)); }
inline void load_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }
inline void release_tiles() { __asm__ volatile("tilerelease"); }

// Loads tile kTile from rows that are `stride` bytes apart, or stores it there.
template <int kTile>
inline void load_tile(const void* rows, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* rows, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

// Adds products of signed bytes: 32-bit column n of row m of kSum gains a[m][4 k + j] * b[k][4 n + j] for all
// k and j.
template <int kSum, int kA, int kB>
inline void add_products(void) {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}
