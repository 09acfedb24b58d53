// What the drivers of the portable layout and of int8 rows share. Built without ISA flags.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/parallel.h"

namespace lb2::cpu {

// Below this much work per chunk, waking a thread costs more than it saves.
constexpr int64_t kMacsPerChunk = 256 * 1024;

// Scales may lie at any byte address.
inline float load_scale(const float* scale, int64_t i) {
  float value;
  std::memcpy(&value, reinterpret_cast<const char*>(scale) + i * 4, 4);
  return value;
}

// run_parallel with `macs` per item deciding the grain.
template <typename Body>
lb2_status run_items(lb2_parallel_for parallel_for, void* context, int64_t count, int64_t macs,
                     const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kMacsPerChunk / std::max<int64_t>(1, macs));
  return run_parallel(parallel_for, context, count, grain, body);
}

}  // namespace lb2::cpu
