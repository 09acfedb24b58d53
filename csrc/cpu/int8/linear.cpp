// The driver of int8 rows: blocks of tokens widened to fp32, parallel tiles of rows, scale and bias.
// Built without ISA flags: all work proportional to the number of weights is in the kernels.
#include <algorithm>
#include <cinttypes>

#include "core/check.h"
#include "core/shape.h"
#include "core/status.h"
#include "cpu/dispatch.h"
#include "cpu/driver.h"
#include "cpu/kernels.h"

namespace lb2::cpu {
namespace {

// Tokens whose fp32 rows stay in the L2 cache while the weights pass by; each block reads all weights.
constexpr int64_t kTokenBlock = 16;
int64_t padded_columns(int64_t k) { return (k + kLanes - 1) / kLanes * kLanes; }

int64_t workspace_bytes(int64_t m, int64_t k) {
  if (m == 0) return 0;
  return std::min(m, kTokenBlock) * padded_columns(k) * static_cast<int64_t>(sizeof(float)) + 63;
}

// One block of at most kTokenBlock tokens.
struct Block {
  const lb2_int8_args& args;
  const Kernels& kernels;
  float* x;  // [tokens, padded_columns(k)]
  int64_t first, tokens;

  int64_t stride() const { return padded_columns(args.k); }
  int64_t bytes() const { return element_bytes(args.dtype); }

  void widen() const {
    const char* input = static_cast<const char*>(args.input);
    for (int64_t t = 0; t < tokens; ++t)
      kernels.load_padded(args.dtype, input + (first + t) * args.input_stride * bytes(), args.k, stride(),
                          x + t * stride());
  }

  void tile(int64_t index) const {
    const int64_t row = index * kTileRows, count = std::min<int64_t>(kTileRows, args.n - row);
    const Int8Rows rows = {args.weight + row * args.weight_stride, args.weight_stride, count, args.k};
    float sums[kTokenBlock * kTileRows];
    kernels.int8_dots(rows, x, stride(), tokens, sums);
    char* output = static_cast<char*>(args.output);
    for (int64_t t = 0; t < tokens; ++t) {
      float* y = sums + t * kTileRows;
      for (int64_t i = 0; i < count; ++i) {
        y[i] *= load_scale(args.scale, row + i);
        if (args.bias != nullptr) y[i] += load_scale(args.bias, row + i);
      }
      kernels.store(args.dtype, y, count, output + ((first + t) * args.output_stride + row) * bytes());
    }
  }
};

lb2_status forward(const lb2_int8_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_int8(args));
  const IsaKernels* kernels;
  LB2_RETURN_IF_ERROR(find_kernels(args->isa, &kernels));
  LB2_RETURN_IF_ERROR(check_int8_buffers(*args, workspace_bytes(args->m, args->k)));
  const uintptr_t address = reinterpret_cast<uintptr_t>(args->workspace);
  float* x = reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
  const int64_t tiles = (args->n + kTileRows - 1) / kTileRows;
  for (int64_t first = 0; first < args->m; first += kTokenBlock) {
    const Block block = {*args, *kernels->portable, x, first, std::min(kTokenBlock, args->m - first)};
    block.widen();
    const auto body = [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) block.tile(index);
    };
    const int64_t macs = kTileRows * args->k * block.tokens;
    LB2_RETURN_IF_ERROR(run_items(args->parallel_for, args->parallel_context, tiles, macs, body));
  }
  return LB2_OK;
}

}  // namespace
}  // namespace lb2::cpu

extern "C" lb2_status lb2_int8_workspace_cpu(int64_t m, int64_t k, int64_t* bytes) {
  LB2_RETURN_IF_ERROR(lb2::check_tokens(m));
  LB2_RETURN_IF_ERROR(lb2::check_columns(k));
  if (bytes == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "bytes must not be NULL");
  *bytes = lb2::cpu::workspace_bytes(m, k);
  return LB2_OK;
}

extern "C" lb2_status lb2_int8_forward_cpu(const lb2_int8_args* args) { return lb2::cpu::forward(args); }
