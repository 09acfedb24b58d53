// Rows of queries and keys widened to fp32, turned by the angles of their token, and rounded. Built without
// ISA flags.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/check.h"
#include "core/shape.h"
#include "cpu/dispatch.h"

namespace lb2::cpu {

// cos and sin of one token.
struct Angles {
  float cos[kMaxRotaryHead], sin[kMaxRotaryHead];
};

struct Turn {
  const Kernels& kernels;
  lb2_dtype dtype;      // of rows
  int64_t head_size;    // elements of a row
  int64_t rotary_size;  // those that turn
  bool interleaved;

  // Reads the angles of token m of batch b. Args: of the rotation, or of a step that has one.
  template <typename Args>
  void load(const Args& args, int64_t b, int64_t m, Angles* angles) const {
    const auto widen = [&](const void* from, const int64_t (&strides)[2], float* to) {
      const int64_t index = b * strides[0] + m * strides[1];
      kernels.load_padded(args.angle_dtype,
                          static_cast<const char*>(from) + index * element_bytes(args.angle_dtype),
                          rotary_size, padded_size(rotary_size), to);
    };
    widen(args.cos, args.cos_strides, angles->cos);
    widen(args.sin, args.sin_strides, angles->sin);
  }

  void row(const void* in, const Angles& angles, void* out) const {
    const int64_t half = rotary_size / 2;
    const float *cos = angles.cos, *sin = angles.sin;
    float x[kMaxRotaryHead], y[kMaxRotaryHead];
    kernels.load_padded(dtype, in, head_size, padded_size(head_size), x);
    if (interleaved) {
      for (int64_t i = 0; i < rotary_size; i += 2) {
        y[i] = x[i] * cos[i] - x[i + 1] * sin[i];
        y[i + 1] = x[i + 1] * cos[i + 1] + x[i] * sin[i + 1];
      }
    } else {
      for (int64_t i = 0; i < half; ++i) {
        y[i] = x[i] * cos[i] - x[half + i] * sin[i];
        y[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
      }
    }
    std::copy(x + rotary_size, x + head_size, y + rotary_size);
    kernels.store(dtype, y, head_size, out);
  }
};

}  // namespace lb2::cpu
