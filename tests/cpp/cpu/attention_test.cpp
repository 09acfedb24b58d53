// Random attention against a double reference, on every instruction set this machine runs, over a
// parallel_for that splits ranges unevenly. All instruction sets must agree to the bit. Wrong arguments.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "littlebit2/littlebit2.h"
#include "random_heads.h"
#include "random_problem.h"

namespace {

bool run_problem(int index) {
  const lb2_dtype dtype = static_cast<lb2_dtype>(pick({LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16}));
  const int64_t batch = pick({1, 1, 2, 3}), kv_heads = pick({1, 2, 3}), group = pick({1, 1, 2, 4, 7});
  const int64_t heads = kv_heads * group, queries = pick({0, 1, 1, 1, 2, 3, 8, 9});
  const int64_t keys = pick({1, 2, 15, 16, 17, 127, 128, 129, 300});
  const int64_t size = pick({1, 7, 16, 31, 64, 80, 128}), value_size = pick({1, 16, 24, 64, 130});
  const Heads query(dtype, batch, heads, queries, size), key(dtype, batch, kv_heads, keys, size);
  const Heads value(dtype, batch, kv_heads, keys, value_size);
  query.fill(batch, heads, queries, size);
  key.fill(batch, kv_heads, keys, size);
  value.fill(batch, kv_heads, keys, value_size);

  // Bytes, or what is added; any dimension but the last may be broadcast.
  const bool masked = engine() % 2, bytes = engine() % 2;
  const int64_t off = engine() % 2;
  const lb2_dtype mask_dtype =
      bytes ? LB2_INT8 : static_cast<lb2_dtype>(pick({LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16}));
  const int64_t mask_element = bytes ? 1 : element_bytes(mask_dtype);
  int64_t mask_strides[3] = {0, 0, 0}, mask_count = keys;
  const int64_t dims[3] = {batch, heads, queries};
  for (int d = 2; d >= 0; --d)
    if (engine() % 2 && dims[d] > 0) {
      mask_strides[d] = mask_count;
      mask_count *= dims[d];
    }
  const Buffer mask(mask_count * mask_element, off);
  const int hidden = static_cast<int>(pick({1, 5, 10}));  // of 10
  for (int64_t i = 0; i < mask_count; ++i) {
    const bool hide = static_cast<int>(engine() % 10) < hidden;
    char* at = mask.data + i * mask_element;
    if (bytes) {
      *at = static_cast<char>(hide ? 0 : 1 + engine() % 255);
    } else if (!hide) {
      random_element(mask_dtype, at);
    } else {
      const float infinite = -std::numeric_limits<float>::infinity();
      const uint16_t half = 0xFC00;
      if (mask_dtype == LB2_FLOAT16)
        std::memcpy(at, &half, 2);
      else
        std::memcpy(at, reinterpret_cast<const char*>(&infinite) + 4 - mask_element,
                    static_cast<size_t>(mask_element));
    }
  }

  lb2_attention_args args = {};
  args.struct_size = sizeof args;
  args.batch = batch;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.queries = queries;
  args.keys = keys;
  args.head_size = size;
  args.value_size = value_size;
  args.query = query.buffer.data;
  args.key = key.buffer.data;
  args.value = value.buffer.data;
  args.dtype = dtype;
  args.scale = 0.25f;
  args.softcap = engine() % 3 ? 0.0f : 3.0f;
  args.causal = engine() % 2;
  if (args.causal) {
    args.offset = keys - queries + pick({0, 0, -2, 3});
    args.window = pick({0, 1, 5, 140});
  }
  std::memcpy(args.query_strides, query.strides, sizeof query.strides);
  std::memcpy(args.key_strides, key.strides, sizeof key.strides);
  std::memcpy(args.value_strides, value.strides, sizeof value.strides);
  if (masked) {
    args.mask = mask.data;
    args.mask_dtype = mask_dtype;
    std::memcpy(args.mask_strides, mask_strides, sizeof mask_strides);
  }
  std::vector<char> first_result;
  for (const lb2_isa isa : kIsas) {
    if (!lb2_cpu_isa_available(isa)) continue;
    args.isa = isa;
    Heads output(dtype, batch, heads, queries, value_size);
    if (isa != LB2_ISA_SCALAR) std::memcpy(output.strides, args.output_strides, sizeof output.strides);
    std::memcpy(args.output_strides, output.strides, sizeof output.strides);
    const int64_t extent = batch * heads * queries == 0
                               ? 0
                               : (batch - 1) * output.strides[0] + (heads - 1) * output.strides[1] +
                                     (queries - 1) * output.strides[2] + value_size;
    output.buffer = Buffer(extent * element_bytes(dtype), off);
    std::memset(output.buffer.data, 0x5A, static_cast<size_t>(extent * element_bytes(dtype)));
    args.output = output.buffer.data;
    args.parallel_for = engine() % 2 ? parallel_for : nullptr;
    args.num_threads = 2;
    int64_t needed = -1;
    if (lb2_attention_workspace_cpu(&args, &needed) != LB2_OK) return false;
    const Buffer workspace(needed, needed > 0 ? off : 0);
    args.workspace = workspace.data;
    args.workspace_bytes = needed;
    if (lb2_attention_forward_cpu(&args) != LB2_OK) {
      std::fprintf(stderr, "problem %d: %s: %s\n", index, lb2_isa_name(isa), lb2_last_error());
      return false;
    }
    const std::vector<char> result(output.buffer.data, output.buffer.data + extent * element_bytes(dtype));
    if (isa == LB2_ISA_SCALAR) add_to_digest(first_result = result);
    if (result != first_result) {
      std::fprintf(stderr, "problem %d: %s and scalar differ in their bits\n", index, lb2_isa_name(isa));
      return false;
    }
    if (isa != LB2_ISA_SCALAR) continue;
    double error = 0.0, norm = 1e-30;
    std::vector<double> scores(static_cast<size_t>(keys)), truth(static_cast<size_t>(value_size));
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t m = 0; m < queries; ++m) {
          double largest = -std::numeric_limits<double>::infinity(), total = 0.0;
          for (int64_t t = 0; t < keys; ++t) {
            double& score = scores[static_cast<size_t>(t)];
            score = 0.0;
            for (int64_t i = 0; i < size; ++i)
              score += decode(dtype, query.at(b, h, m, i)) * decode(dtype, key.at(b, h / group, t, i));
            score *= 0.25;
            if (args.softcap > 0.0f) score = 3.0 * std::tanh(score / 3.0);
            const int64_t at = b * mask_strides[0] + h * mask_strides[1] + m * mask_strides[2] + t;
            const char* added = mask.data + at * mask_element;
            if (masked && bytes && *added == 0) score = -std::numeric_limits<double>::infinity();
            // decode() takes the infinity of float16 for a number.
            if (masked && !bytes && decode(mask_dtype, added) <= -65536.0)
              score = -std::numeric_limits<double>::infinity();
            else if (masked && !bytes)
              score += decode(mask_dtype, added);
            if (args.causal && t > m + args.offset) score = -std::numeric_limits<double>::infinity();
            if (args.window != 0 && t <= m + args.offset - args.window)
              score = -std::numeric_limits<double>::infinity();
            largest = std::max(largest, score);
          }
          std::fill(truth.begin(), truth.end(), 0.0);
          for (int64_t t = 0; t < keys && std::isfinite(largest); ++t) {
            const double weight = std::exp(scores[static_cast<size_t>(t)] - largest);
            total += weight;
            for (int64_t i = 0; i < value_size; ++i)
              truth[static_cast<size_t>(i)] += weight * decode(dtype, value.at(b, h / group, t, i));
          }
          for (int64_t i = 0; i < value_size; ++i) {
            const double wanted = total > 0.0 ? truth[static_cast<size_t>(i)] / total : 0.0;
            const double got = decode(dtype, output.at(b, h, m, i));
            error += (got - wanted) * (got - wanted);
            norm += std::max(wanted * wanted, 1e-3);
          }
        }
    if (!(std::sqrt(error) <= tolerance(dtype) * std::sqrt(norm))) {
      std::fprintf(stderr, "problem %d: relative error %.2e\n", index, std::sqrt(error / norm));
      return false;
    }
  }
  return true;
}

bool refuses(const char* part, void (*change)(lb2_attention_args*)) {
  static const float input[64] = {};
  static float output[64];
  static char workspace[8192];
  lb2_attention_args args = {};
  args.struct_size = sizeof args;
  args.batch = args.kv_heads = args.queries = 1;
  args.heads = 2;
  args.keys = 3;
  args.head_size = args.value_size = 4;
  args.query = args.key = args.value = input;
  args.output = output;
  for (int64_t* strides : {args.query_strides, args.key_strides, args.value_strides, args.output_strides})
    strides[1] = strides[2] = 4;
  args.scale = 1.0f;
  args.workspace = workspace;
  args.workspace_bytes = sizeof workspace;
  return refuses(lb2_attention_forward_cpu, args, part, change);
}

}  // namespace

int main(int argc, char** argv) {
  int failed = run_problems(argc, argv, problem_count(300), run_problem);
  using Args = lb2_attention_args;
  failed += !refuses("struct_size must equal", [](Args* args) { args->struct_size = 8; });
  failed += !refuses("must be below about 2^57", [](Args* args) {
    args->batch = args->heads = INT32_MAX;
    args->kv_heads = 1;
  });
  lb2_attention_args large = {};
  large.struct_size = sizeof large;
  large.batch = large.heads = INT32_MAX;
  large.kv_heads = large.keys = large.head_size = large.value_size = large.queries = 1;
  int64_t bytes = 0;
  failed += lb2_attention_workspace_cpu(&large, &bytes) != LB2_ERROR_INVALID_ARGUMENT;
  failed += !refuses("keys must be between 1", [](Args* args) { args->keys = 0; });
  failed += !refuses("multiple of kv_heads = 3", [](Args* args) { args->kv_heads = 3; });
  failed += !refuses("dtype must be", [](Args* args) { args->dtype = LB2_INT8; });
  failed += !refuses("causal must be 0 or 1", [](Args* args) { args->causal = 2; });
  failed += !refuses("window must be 0", [](Args* args) { args->window = 2; });
  failed += !refuses("offset must be between", [](Args* args) {
    args->causal = 1;
    args->offset = INT64_MAX;
  });
  failed += !refuses("scale must be finite", [](Args* args) { args->scale = HUGE_VALF; });
  failed += !refuses("softcap must be finite", [](Args* args) { args->softcap = -1.0f; });
  failed += !refuses("key must not be NULL", [](Args* args) { args->key = nullptr; });
  failed += !refuses("value_strides[2] must be", [](Args* args) { args->value_strides[2] = -1; });
  failed += !refuses("key_strides[2] = ", [](Args* args) { args->key_strides[2] = INT64_MAX / 2; });
  failed += !refuses("workspace_bytes must be", [](Args* args) { args->workspace_bytes = 8; });
  failed += !refuses("mask_dtype must be", [](Args* args) {
    args->mask = args->query;
    args->mask_dtype = 7;
  });
  std::printf("%d failed\n", failed);
  return failed == 0 ? 0 : 1;
}
