/* Packed format v1: how signs lie in memory. The normative text is docs/format.md.
 *
 * Includes libc types only. littlebit2_kernels/format.py has the same constants, and a test that parses this
 * header compares them: each constant must stay a plain `#define NAME value`.
 */
#ifndef LITTLEBIT2_FORMAT_H_
#define LITTLEBIT2_FORMAT_H_

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "littlebit2 needs a little-endian target: words of signs are read as they lie in memory"
#endif

#include <stdint.h>

/* Version of the layout; independent of the package version. */
#define LB2_FORMAT_VERSION 1

/* A sign matrix is stored row-major in 32-bit words. Column c of a row is in word c / 32. */
#define LB2_WORD_BITS 32

/* Column c occupies bit c % 32, counted from the least significant bit. */
#define LB2_FIRST_BIT 0

/* The bit value for -1; the other value is +1. sign(0) = +1. */
#define LB2_NEGATIVE_BIT 1

/* Bits past the last column of a row (in U: past the rank) have this value, which is +1. */
#define LB2_PAD_BIT 0

/* The rank of a two-stage path is a multiple of this. */
#define LB2_RANK_MULTIPLE 8

/* Largest number of paths of one layer. */
#define LB2_MAX_PATHS 16

/* Words per row of `cols` signs. */
static inline int64_t lb2_words_per_row(int64_t cols) {
  return cols / LB2_WORD_BITS + (cols % LB2_WORD_BITS != 0);
}

#endif /* LITTLEBIT2_FORMAT_H_ */
