// Where the 15 signs of a row lie in a block of 32 rows: 64 bytes in either order.
//
//  lanes:  16-bit lanes; row i is lane 2 i, row 16 + i is lane 2 i + 1, so that 32-bit lanes hold rows i and
//          16 + i. A lane holds the word of lookup.h as it is.
//  planes: two bytes of each row, byte 0 of row i at i, byte 1 at 32 + i. Byte 0 holds group 0 above the
//  three
//          lower bits of group 1, byte 1 group 2 above the two upper bits of group 1. One shift of a vector
//          of bytes makes indices of groups 0 and 2, one insertion and one mask those of group 1.
//
// 64-bit ARM has the planes, because its table lookups work on bytes; all others have the lanes. Include this
// where elementwise_body.h says, or in an unnamed namespace.

#if defined(__aarch64__)
constexpr bool kBytePlanes = true;
#else
constexpr bool kBytePlanes = false;
#endif

// The two bytes of a word, as one number, and back.
inline uint16_t to_planes(uint16_t word) {
  const unsigned group0 = word & 31u, group1 = word >> 5 & 31u, group2 = word >> 10;
  return static_cast<uint16_t>(group0 << 3 | (group1 & 7u) | (group2 << 3 | group1 >> 3) << 8);
}
inline uint16_t from_planes(uint16_t bytes) {
  const unsigned group1 = (bytes & 7u) | (bytes >> 8 & 3u) << 3;
  return static_cast<uint16_t>((bytes >> 3 & 31u) | group1 << 5 | (bytes >> 11) << 10);
}

// Bytes from the start of a block to what belongs to a row, and between its two bytes.
inline int64_t row_offset(int64_t row) {
  if (kBytePlanes) return row;
  return row < kBlockRows / 2 ? 4 * row : 4 * (row - kBlockRows / 2) + 2;
}

inline void store_word(uint16_t word, char* at) {
  if (!kBytePlanes) {
    std::memcpy(at, &word, 2);
    return;
  }
  const uint16_t bytes = to_planes(word);
  at[0] = static_cast<char>(bytes & 0xFF);
  at[kBlockRows] = static_cast<char>(bytes >> 8);
}
inline uint16_t load_word(const char* at) {
  uint16_t word;
  if (!kBytePlanes) {
    std::memcpy(&word, at, 2);
    return word;
  }
  return from_planes(
      static_cast<uint16_t>(static_cast<uint8_t>(at[0]) | static_cast<uint8_t>(at[kBlockRows]) << 8));
}
