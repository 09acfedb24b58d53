// Random tensors of heads with strides of their own, for tests of attention.
#pragma once

#include "littlebit2/littlebit2.h"
#include "random_problem.h"

// Rows [B, H, T] of `size` elements, random, with spare elements between them.
struct Heads {
  lb2_dtype dtype;
  int64_t strides[3];
  Buffer buffer;

  static int64_t spare() { return static_cast<int64_t>(engine() % 4); }
  static int64_t count(int64_t b, int64_t h, int64_t t, int64_t size, int64_t (&strides)[3]) {
    // Heads outside of rows, as in a cache, or inside, as a projection leaves them.
    if (engine() % 2) {
      strides[2] = size + spare();
      strides[1] = strides[2] * t + spare();
      strides[0] = strides[1] * h + spare();
    } else {
      strides[1] = size + spare();
      strides[2] = strides[1] * h + spare();
      strides[0] = strides[2] * t + spare();
    }
    return b * h * t == 0 ? 0 : (b - 1) * strides[0] + (h - 1) * strides[1] + (t - 1) * strides[2] + size;
  }
  Heads(lb2_dtype type, int64_t b, int64_t h, int64_t t, int64_t size)
      : dtype(type),
        // Braces: what is drawn first does not depend on the compiler.
        buffer{count(b, h, t, size, strides) * element_bytes(type), static_cast<int64_t>(engine() % 2)} {}
  char* at(int64_t b, int64_t h, int64_t t, int64_t i = 0) const {
    return buffer.data + (b * strides[0] + h * strides[1] + t * strides[2] + i) * element_bytes(dtype);
  }
  int64_t bytes(int64_t b, int64_t h, int64_t t, int64_t size) const {
    if (b * h * t == 0) return 0;
    return ((b - 1) * strides[0] + (h - 1) * strides[1] + (t - 1) * strides[2] + size) * element_bytes(dtype);
  }
  void fill(int64_t b, int64_t h, int64_t t, int64_t size) const {
    for (int64_t x = 0; x < b; ++x)
      for (int64_t y = 0; y < h; ++y)
        for (int64_t z = 0; z < t; ++z)
          for (int64_t i = 0; i < size; ++i) random_element(dtype, at(x, y, z, i));
  }
};
