// What kernels on tiles need before their instructions. Include this where elementwise_body.h says.

constexpr int kWordQuarters = 4;  // of four bits, which become four bytes of a lane

// Byte b of a tile's row holds bit 4 q + b % 4 of the word of row b / 4 of the block, and for the upper rows
// that of row 16 + b / 4: lanes of word.h. Control b of a row says where a byte with that bit at its top
// begins in the 64 bits that b lies in.
struct BitControls {
  alignas(64) uint8_t bytes[2][kWordQuarters][64];
  constexpr BitControls() : bytes() {
    for (int half = 0; half < 2; ++half)
      for (int q = 0; q < kWordQuarters; ++q)
        for (int b = 0; b < 64; ++b)
          bytes[half][q][b] =
              static_cast<uint8_t>((b % 8 / 4 * 32 + half * 16 + 4 * q + b % 4 + 64 - 7) % 64);
  }
};
static constexpr BitControls kBitControls;

struct Magnitudes {
  float most, total;  // `most` drops NaN, `total` does not
};
