// Rotary position embedding: rows widened to fp32, turned, and rounded. Built without ISA flags.
#include <algorithm>

#include "core/check.h"
#include "core/shape.h"
#include "core/status.h"
#include "cpu/dispatch.h"
#include "cpu/driver.h"

namespace lb2::cpu {
namespace {

int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

struct Turn {
  const lb2_rotary_args& args;
  const Kernels& kernels;

  // Turns the rows of one tensor at one token. Rows of the output follow each other.
  void rows(const void* in, const int64_t (&strides)[3], int64_t b, int64_t m, int64_t heads,
            const float* cos, const float* sin, void* out) const {
    const int64_t bytes = element_bytes(args.dtype), size = args.head_size, half = args.rotary_size / 2;
    float x[kMaxRotaryHead], y[kMaxRotaryHead];
    const char* from = static_cast<const char*>(in) + (b * strides[0] + m * strides[2]) * bytes;
    char* to = static_cast<char*>(out) + (b * args.tokens + m) * heads * size * bytes;
    for (int64_t h = 0; h < heads; ++h) {
      kernels.load_padded(args.dtype, from + h * strides[1] * bytes, size, padded(size), x);
      if (args.interleaved) {
        for (int64_t i = 0; i < 2 * half; i += 2) {
          y[i] = x[i] * cos[i] - x[i + 1] * sin[i];
          y[i + 1] = x[i + 1] * cos[i + 1] + x[i] * sin[i + 1];
        }
      } else {
        for (int64_t i = 0; i < half; ++i) {
          y[i] = x[i] * cos[i] - x[half + i] * sin[i];
          y[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
        }
      }
      std::copy(x + 2 * half, x + size, y + 2 * half);
      kernels.store(args.dtype, y, size, to + h * size * bytes);
    }
  }

  void token(int64_t index) const {
    const int64_t b = index / args.tokens, m = index % args.tokens, bytes = element_bytes(args.angle_dtype);
    float cos[kMaxRotaryHead], sin[kMaxRotaryHead];
    const auto load = [&](const void* angles, const int64_t (&strides)[2], float* out) {
      const char* at = static_cast<const char*>(angles) + (b * strides[0] + m * strides[1]) * bytes;
      kernels.load_padded(args.angle_dtype, at, args.rotary_size, padded(args.rotary_size), out);
    };
    load(args.cos, args.cos_strides, cos);
    load(args.sin, args.sin_strides, sin);
    rows(args.query, args.query_strides, b, m, args.heads, cos, sin, args.query_out);
    rows(args.key, args.key_strides, b, m, args.kv_heads, cos, sin, args.key_out);
  }
};

}  // namespace
}  // namespace lb2::cpu

extern "C" lb2_status lb2_rotary_forward_cpu(const lb2_rotary_args* args) {
  LB2_RETURN_IF_ERROR(lb2::check_rotary(args));
  const lb2::cpu::IsaKernels* isa;
  LB2_RETURN_IF_ERROR(lb2::cpu::find_kernels(args->isa, &isa));
  const lb2::cpu::Turn turn = {*args, *isa->portable};
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) turn.token(index);
  };
  // An element costs about as much as sixteen multiply-adds of a kernel.
  const int64_t macs = (args->heads + args->kv_heads) * args->head_size * 16;
  return lb2::cpu::run_items(args->parallel_for, args->parallel_context, args->batch * args->tokens, macs,
                             body);
}
