// The tiles of a thread, for machines without AMX: what the instructions of instructions.h work on, and what
// tests look at.
#pragma once

#include <cstdint>

namespace lb2::amx_host {

struct Tiles {
  uint8_t palette = 0;
  uint8_t config[64] = {};
  uint8_t rows[8] = {};
  uint16_t columns[8] = {};  // bytes
  uint8_t data[8][16][64] = {};
  int64_t products = 0;  // of tiles, since the thread began
};

inline thread_local Tiles tiles;

}  // namespace lb2::amx_host
