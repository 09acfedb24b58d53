// csrc/cuda/device.h on the host: the same functions, with MMAs computed from fragments as the PTX ISA
// documents them.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_host/run_grid.h"

#define LB2_DEVICE inline
#define LB2_HOST_DEVICE inline
#define LB2_KERNEL(...) void
#define LB2_GRID_CONSTANT

namespace lb2::cuda {

constexpr bool kOneBitEmulated = false;

inline int thread_id() { return host::position().thread; }
inline int block_x() { return host::position().x; }
inline int block_y() { return host::position().y; }
inline int block_z() { return host::position().z; }
inline unsigned char* shared_memory() { return host::shared(); }
inline void sync_block() { host::sync_block(); }
inline void sync_warp() {
  host::warp_operation("sync_warp", nullptr, [](void**) {});
}
inline void sync_cluster() { host::sync_cluster(); }
inline void* shared_of_block(void* own, int rank) { return host::shared_of_block(own, rank); }
struct ShuffleSlot {
  uint32_t value, result;
  int mask;
};

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  ShuffleSlot slot = {value, 0, mask};
  host::warp_operation("shuffle_xor", &slot, [](void** slots) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* own = static_cast<ShuffleSlot*>(slots[lane]);
      own->result = static_cast<ShuffleSlot*>(slots[lane ^ own->mask])->value;
    }
  });
  return slot.result;
}

template <typename T>
struct ReduceSlot {
  T value, result;
};

template <typename T, typename Combine>
T reduce(const char* name, T value, const Combine&) {
  ReduceSlot<T> slot = {value, T{}};
  host::warp_operation(name, &slot, [](void** slots) {
    T all = static_cast<ReduceSlot<T>*>(slots[0])->value;
    for (int lane = 1; lane < 32; ++lane)
      all = Combine{}(all, static_cast<ReduceSlot<T>*>(slots[lane])->value);
    for (int lane = 0; lane < 32; ++lane) static_cast<ReduceSlot<T>*>(slots[lane])->result = all;
  });
  return slot.result;
}

struct Larger {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};
struct WrappingSum {
  int32_t operator()(int32_t a, int32_t b) const {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
};

inline uint32_t warp_max(uint32_t value) { return reduce("warp_max", value, Larger{}); }
inline int32_t warp_sum(int32_t value) { return reduce("warp_sum", value, WrappingSum{}); }

inline int popcount(uint32_t word) { return __builtin_popcount(word); }

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float shuffle_xor(float value, int mask) { return bits_float(shuffle_xor(float_bits(value), mask)); }

inline float multiply_rounded(float a, float b) { return a * b; }
inline float fast_divide(float a, float b) { return a / b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline float reciprocal_root(float value) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value)));
}
inline float exponential(float value) { return std::exp(value); }
inline float error_function(float value) { return std::erf(value); }
inline float hyperbolic_tangent(float value) { return std::tanh(value); }

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude;
  if (exponent == 31)
    magnitude = fraction != 0 ? NAN : INFINITY;
  else
    magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Round to nearest, ties to even.
inline uint16_t float_to_half(float value) {
  const uint32_t sign = float_bits(value) >> 16 & 0x8000u;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7FFF);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00);
  int exponent;
  std::frexp(magnitude, &exponent);
  if (exponent < -13 || magnitude == 0.0f) exponent = -13;  // subnormal: steps of 2^-24
  const float steps = std::nearbyint(std::ldexp(magnitude, 11 - exponent));
  return static_cast<uint16_t>(sign + static_cast<uint32_t>((exponent + 13) * 1024) +
                               static_cast<uint32_t>(steps));
}

inline float bfloat_to_float(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_bits(value);
  if (std::isnan(value)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

template <typename T>
const T* check_alignment(const char* what, const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    std::fprintf(stderr, "cuda_host: %s of %zu bytes at a misaligned address\n", what, bytes);
    std::abort();
  }
  return static_cast<const T*>(p);
}

inline Words4 load_words4(const void* p) { return *check_alignment<Words4>("load_words4", p, 16); }
inline Words4 load_stream(const uint32_t* p) { return *check_alignment<Words4>("load_stream", p, 16); }
inline uint32_t load_stream_word(const uint32_t* p) {
  return *check_alignment<uint32_t>("load_stream_word", p, 4);
}
inline float load_stream_float(const float* p) { return *check_alignment<float>("load_stream_float", p, 4); }
inline Words4 load_stream(const uint32_t* p, bool inside) { return inside ? load_stream(p) : Words4{}; }
inline void load_stream_words(const uint32_t* p, int count, Words4& words) {
  for (int i = 0; i < count; ++i) words.w[i] = load_stream_word(p + i);
}

// Reads a byte: addresses must be good. The cache of a GPU holds what is written later, too: what a thread
// may not read before it has waited may be cached.
inline void prefetch(const void* p) { host::touch(p); }

// Copies are under way until the thread waits for them: the destination is garbage until then.
inline void copy_words4(void* shared, const void* global) {
  const Words4 value = *check_alignment<Words4>("copy_words4", global, 16);
  check_alignment<Words4>("copy_words4", shared, 16);
  std::memset(shared, 0xFF, sizeof value);
  host::pending_copies().copies.push_back({shared, value, sizeof value});
}
inline void copy_word(void* shared, const void* global, bool inside) {
  check_alignment<uint32_t>("copy_word", global, 4);
  check_alignment<uint32_t>("copy_word", shared, 4);
  const Words4 value = {{inside ? *static_cast<const uint32_t*>(global) : 0u, 0, 0, 0}};
  std::memset(shared, 0xFF, sizeof(uint32_t));
  host::pending_copies().copies.push_back({shared, value, sizeof(uint32_t)});
}
// The oldest `count` copies arrive.
inline void finish_copies(size_t count) {
  std::vector<host::PendingCopy>& copies = host::pending_copies().copies;
  for (size_t i = 0; i < count; ++i) std::memcpy(copies[i].to, &copies[i].value, copies[i].bytes);
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(count));
}
inline void wait_for_copies() {
  finish_copies(host::pending_copies().copies.size());
  host::pending_copies().group_ends.clear();
}
inline void commit_copies() {
  host::pending_copies().group_ends.push_back(host::pending_copies().copies.size());
}
template <int kGroups>
void wait_for_copy_groups() {
  std::vector<size_t>& ends = host::pending_copies().group_ends;
  if (ends.size() <= kGroups) return;
  const auto kept = ends.end() - kGroups;
  const size_t count = *(kept - 1);
  finish_copies(count);
  ends.erase(ends.begin(), kept);
  for (size_t& end : ends) end -= count;
}

// One lane's registers of an MMA.
template <typename C>
struct MmaSlot {
  C* c;
  const uint32_t *a, *b;
};

// Row, column and k of register elements.
inline int fragment_row(int lane, int index) { return lane / 4 + 8 * (index % 2); }

// counts += popcount(rows & columns). Always inlined, to be compiled for a CPU with the instruction and
// without.
__attribute__((always_inline)) inline void count_bits(const uint64_t (&rows)[16][4],
                                                      const uint64_t (&columns)[8][4],
                                                      int32_t (&counts)[16][8]) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      int count = 0;
      for (int k = 0; k < 4; ++k) count += __builtin_popcountll(rows[row][k] & columns[column][k]);
      counts[row][column] = count;
    }
}
#if defined(__x86_64__)
__attribute__((target("popcnt"))) inline void count_bits_popcnt(const uint64_t (&rows)[16][4],
                                                                const uint64_t (&columns)[8][4],
                                                                int32_t (&counts)[16][8]) {
  count_bits(rows, columns, counts);
}
#endif

inline void mma_b1_and(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaSlot<int32_t> slot = {c, a, b};
  host::warp_operation("mma_b1_and", &slot, [](void** slots) {
    uint64_t rows[16][4] = {}, columns[8][4] = {};  // 256 bits each
    int32_t counts[16][8];
    const auto put = [](uint64_t* bits, int word, uint32_t value) {
      bits[word / 2] |= static_cast<uint64_t>(value) << (32 * (word % 2));
    };
    for (int lane = 0; lane < 32; ++lane) {
      const auto* own = static_cast<MmaSlot<int32_t>*>(slots[lane]);
      for (int i = 0; i < 4; ++i) put(rows[fragment_row(lane, i)], lane % 4 + 4 * (i / 2), own->a[i]);
      for (int i = 0; i < 2; ++i) put(columns[lane / 4], lane % 4 + 4 * i, own->b[i]);
    }
#if defined(__x86_64__)
    static const bool has_popcnt = __builtin_cpu_supports("popcnt");
    if (has_popcnt)
      count_bits_popcnt(rows, columns, counts);
    else
#endif
      count_bits(rows, columns, counts);
    for (int lane = 0; lane < 32; ++lane) {
      int32_t* out = static_cast<MmaSlot<int32_t>*>(slots[lane])->c;
      for (int i = 0; i < 4; ++i) out[i] += counts[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
  });
}

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaSlot<float> slot = {c, a, b};
  host::warp_operation("mma_f16", &slot, [](void** slots) {
    static const float* values = [] {
      static float table[65536];
      for (uint32_t bits = 0; bits < 65536; ++bits) table[bits] = half_to_float(static_cast<uint16_t>(bits));
      return table;
    }();
    float rows[16][16], columns[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* own = static_cast<MmaSlot<float>*>(slots[lane]);
      for (int half = 0; half < 2; ++half) {
        const int k = 2 * (lane % 4) + half;
        for (int i = 0; i < 4; ++i)
          rows[fragment_row(lane, i)][k + 8 * (i / 2)] = values[own->a[i] >> (16 * half) & 0xFFFFu];
        for (int i = 0; i < 2; ++i) columns[lane / 4][k + 8 * i] = values[own->b[i] >> (16 * half) & 0xFFFFu];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* out = static_cast<MmaSlot<float>*>(slots[lane])->c;
      for (int i = 0; i < 4; ++i) {
        double sum = out[i];
        for (int k = 0; k < 16; ++k)
          sum += static_cast<double>(rows[lane / 4 + 8 * (i / 2)][k]) * columns[2 * (lane % 4) + i % 2][k];
        out[i] = static_cast<float>(sum);
      }
    }
  });
}

inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaSlot<int32_t> slot = {c, a, b};
  host::warp_operation("mma_s8", &slot, [](void** slots) {
    int32_t rows[16][32], columns[8][32];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* own = static_cast<MmaSlot<int32_t>*>(slots[lane]);
      for (int byte = 0; byte < 4; ++byte) {
        const int k = 4 * (lane % 4) + byte;
        const auto element = [byte](uint32_t word) {
          return static_cast<int8_t>(word >> (8 * byte) & 0xFFu);
        };
        for (int i = 0; i < 4; ++i) rows[fragment_row(lane, i)][k + 16 * (i / 2)] = element(own->a[i]);
        for (int i = 0; i < 2; ++i) columns[lane / 4][k + 16 * i] = element(own->b[i]);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      int32_t* out = static_cast<MmaSlot<int32_t>*>(slots[lane])->c;
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 32; ++k)
          out[i] += rows[lane / 4 + 8 * (i / 2)][k] * columns[2 * (lane % 4) + i % 2][k];
    }
  });
}

inline uint32_t sign_pair_f16(uint32_t word, int bit) {
  return ((word << (15 - bit)) & 0x80008000u) | 0x3C003C00u;
}

inline void wait_for_previous_kernel() { host::wait_for_previous_kernel(); }
inline void let_next_kernel_start() { host::let_next_kernel_start(); }

}  // namespace lb2::cuda
