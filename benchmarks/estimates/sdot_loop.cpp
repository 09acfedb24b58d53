// What the lookup kernels of NEON are counted beside: signs as bytes, and dot products of four of them.
// Compiled and counted by `python -m benchmarks arm-cycles`, and run by nobody.
//
// Bit b of byte 4 r + j of a register of signs is that of row r and column 4 b + j, so that one test of a bit
// makes 16 masks, 0 or -1, of four rows and four columns. y = sum x + 2 * (sum of x where the mask is -1, as
// the products are negative). Activations are 15-bit integers in two planes of bytes, or 8-bit ones in one
// plane.
#include <arm_neon.h>

#include <cstdint>

namespace {

constexpr int kRegisters = 4;  // of four rows each, side by side

template <int kBit, int kPlanes>
inline void add_columns(const uint8x16_t* signs, const int8x16_t (&x)[kPlanes][2],
                        int32x4_t (&sums)[kPlanes][kRegisters]) {
  const uint8x16_t bit = vdupq_n_u8(1u << kBit);
#pragma GCC unroll 4
  for (int r = 0; r < kRegisters; ++r) {
    const int8x16_t masks = vreinterpretq_s8_u8(vtstq_u8(signs[r], bit));
#pragma GCC unroll 2
    for (int p = 0; p < kPlanes; ++p)
      sums[p][r] = vdotq_laneq_s32(sums[p][r], masks, x[p][kBit / 4], kBit % 4);
  }
}

template <int kPlanes>
inline void sum_rows(const uint8_t* data, const int8_t* activations, int64_t steps, int32_t* out) {
  int32x4_t sums[kPlanes][kRegisters];
  for (auto& plane : sums)
    for (int32x4_t& sum : plane) sum = vdupq_n_s32(0);
  for (int64_t step = 0; step < steps; ++step, data += 16 * kRegisters, activations += 32 * kPlanes) {
    uint8x16_t signs[kRegisters];
    int8x16_t x[kPlanes][2];
    for (int r = 0; r < kRegisters; ++r) signs[r] = vld1q_u8(data + 16 * r);
    for (int p = 0; p < kPlanes; ++p)
      for (int half = 0; half < 2; ++half) x[p][half] = vld1q_s8(activations + 32 * p + 16 * half);
    add_columns<0, kPlanes>(signs, x, sums);
    add_columns<1, kPlanes>(signs, x, sums);
    add_columns<2, kPlanes>(signs, x, sums);
    add_columns<3, kPlanes>(signs, x, sums);
    add_columns<4, kPlanes>(signs, x, sums);
    add_columns<5, kPlanes>(signs, x, sums);
    add_columns<6, kPlanes>(signs, x, sums);
    add_columns<7, kPlanes>(signs, x, sums);
  }
  for (int p = 0; p < kPlanes; ++p)
    for (int r = 0; r < kRegisters; ++r) vst1q_s32(out + 4 * (p * kRegisters + r), sums[p][r]);
}

}  // namespace

extern "C" void sdot_two_planes(const uint8_t* data, const int8_t* activations, int64_t steps, int32_t* out) {
  sum_rows<2>(data, activations, steps, out);
}
extern "C" void sdot_one_plane(const uint8_t* data, const int8_t* activations, int64_t steps, int32_t* out) {
  sum_rows<1>(data, activations, steps, out);
}
