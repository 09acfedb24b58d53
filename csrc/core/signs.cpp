// Packing and unpacking of sign matrices: portable and memory-bound. Used when layers are made and loaded.
#include <cinttypes>
#include <cstddef>
#include <cstring>

#include "core/status.h"
#include "littlebit2/littlebit2.h"

namespace lb2 {
namespace {

lb2_status check_matrix(int64_t rows, int64_t cols, const char* dense_name, const void* dense,
                        int64_t dense_stride, const void* words, int64_t words_stride) {
  if (rows < 0 || rows > INT32_MAX)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "rows must be between 0 and %d, got %" PRId64, INT32_MAX, rows);
  if (cols < 0 || cols > INT32_MAX)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "cols must be between 0 and %d, got %" PRId64, INT32_MAX, cols);
  if (rows == 0 || cols == 0) return LB2_OK;
  if (dense == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "%s must not be NULL", dense_name);
  if (words == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "words must not be NULL");
  if (rows > 1 && dense_stride < cols)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "%s_stride must be >= cols = %" PRId64 ", got %" PRId64,
                dense_name, cols, dense_stride);
  if (rows > 1 && words_stride < lb2_words_per_row(cols))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "words_stride must be >= %" PRId64 ", got %" PRId64,
                lb2_words_per_row(cols), words_stride);
  int64_t extent;
  if (__builtin_mul_overflow(rows, dense_stride, &extent) || __builtin_mul_overflow(extent, 4, &extent) ||
      __builtin_mul_overflow(rows, words_stride, &extent) || __builtin_mul_overflow(extent, 4, &extent))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "rows = %" PRId64 " times a row stride overflows the address range", rows);
  return LB2_OK;
}

uint32_t pack_word(const uint8_t* negative, int64_t count) {
  uint32_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= static_cast<uint32_t>(negative[i] != 0) << i;
  return word;
}

// Element: an unsigned integer of the width of the output type; plus and minus are the bit patterns of +1 and
// -1.
template <typename Element>
void unpack_rows(const int32_t* words, int64_t words_stride, int64_t rows, int64_t cols, Element plus,
                 Element minus, char* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    char* row = out + r * out_stride * static_cast<int64_t>(sizeof(Element));
    for (int64_t begin = 0; begin < cols; begin += LB2_WORD_BITS) {
      uint32_t word;
      std::memcpy(&word,
                  reinterpret_cast<const char*>(words) + (r * words_stride + begin / LB2_WORD_BITS) * 4, 4);
      const int64_t count = cols - begin < LB2_WORD_BITS ? cols - begin : LB2_WORD_BITS;
      Element expanded[LB2_WORD_BITS];
      for (int i = 0; i < LB2_WORD_BITS; ++i) expanded[i] = (word >> i) & 1u ? minus : plus;
      std::memcpy(row + begin * static_cast<int64_t>(sizeof(Element)), expanded,
                  static_cast<size_t>(count) * sizeof(Element));
    }
  }
}

}  // namespace
}  // namespace lb2

extern "C" lb2_status lb2_pack_signs(const uint8_t* negative, int64_t negative_stride, int64_t rows,
                                     int64_t cols, int32_t* words, int64_t words_stride) {
  LB2_RETURN_IF_ERROR(
      lb2::check_matrix(rows, cols, "negative", negative, negative_stride, words, words_stride));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t begin = 0; begin < cols; begin += LB2_WORD_BITS) {
      const int64_t count = cols - begin < LB2_WORD_BITS ? cols - begin : LB2_WORD_BITS;
      const uint8_t* source = negative + r * negative_stride + begin;
      // The constant count lets the compiler unroll and vectorize the common case.
      const uint32_t word =
          count == LB2_WORD_BITS ? lb2::pack_word(source, LB2_WORD_BITS) : lb2::pack_word(source, count);
      std::memcpy(reinterpret_cast<char*>(words) + (r * words_stride + begin / LB2_WORD_BITS) * 4, &word, 4);
    }
  }
  return LB2_OK;
}

extern "C" lb2_status lb2_unpack_signs(const int32_t* words, int64_t words_stride, int64_t rows, int64_t cols,
                                       lb2_dtype dtype, void* out, int64_t out_stride) {
  LB2_RETURN_IF_ERROR(lb2::check_matrix(rows, cols, "out", out, out_stride, words, words_stride));
  char* bytes = static_cast<char*>(out);
  switch (dtype) {
    case LB2_FLOAT32:
      lb2::unpack_rows<uint32_t>(words, words_stride, rows, cols, 0x3F800000u, 0xBF800000u, bytes,
                                 out_stride);
      return LB2_OK;
    case LB2_FLOAT16:
      lb2::unpack_rows<uint16_t>(words, words_stride, rows, cols, 0x3C00u, 0xBC00u, bytes, out_stride);
      return LB2_OK;
    case LB2_BFLOAT16:
      lb2::unpack_rows<uint16_t>(words, words_stride, rows, cols, 0x3F80u, 0xBF80u, bytes, out_stride);
      return LB2_OK;
    case LB2_INT8:
      lb2::unpack_rows<uint8_t>(words, words_stride, rows, cols, 0x01u, 0xFFu, bytes, out_stride);
      return LB2_OK;
    default:
      return lb2::fail(LB2_ERROR_INVALID_ARGUMENT,
                       "dtype must be LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16 or LB2_INT8, got %" PRId32,
                       dtype);
  }
}
