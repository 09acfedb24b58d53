// Random steps of decoding: the bits of a rotation, copies into the cache and attention, one after another,
// which have tests of their own; on every instruction set, over a parallel_for that splits ranges unevenly.
// Wrong arguments.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "littlebit2/littlebit2.h"
#include "random_heads.h"
#include "random_problem.h"

namespace {

void copy_strides(const Heads& heads, int64_t (&strides)[3]) {
  std::memcpy(strides, heads.strides, sizeof strides);
}

struct Problem {
  lb2_dtype dtype, angle_dtype;
  int64_t batch, kv_heads, heads, queries, keys, size, value_size, rotary_size, position;
  bool masked, causal, interleaved, shared_angles;
  int64_t window;
  float softcap;
};

Problem random_shape() {
  Problem p = {};
  p.dtype = static_cast<lb2_dtype>(pick({LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16}));
  p.angle_dtype = static_cast<lb2_dtype>(pick({LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16}));
  p.batch = pick({0, 1, 1, 2, 3});
  p.kv_heads = pick({1, 2, 3});
  p.heads = p.kv_heads * pick({1, 1, 2, 4, 7});
  p.queries = pick({0, 1, 1, 1, 1, 2, 3, 8, 9});
  p.keys = p.queries + pick({0, 1, 16, 100, 127, 128, 300});
  if (p.keys == 0) p.keys = 1;
  p.size = pick({2, 7, 16, 64, 80, 128, 256});
  p.value_size = pick({1, 16, 24, 64, 130});
  p.rotary_size = engine() % 2 ? p.size / 2 * 2 : 2 + p.size / 4 / 2 * 2;
  if (p.rotary_size > p.size) p.rotary_size = 2;
  p.position = engine() % 2 ? p.keys - p.queries : (p.keys - p.queries) / 2;
  p.masked = engine() % 2;
  p.causal = engine() % 2;
  p.interleaved = engine() % 2;
  p.shared_angles = engine() % 2;
  p.window = p.causal ? pick({0, 0, 1, 9}) : 0;
  p.softcap = engine() % 3 ? 0.0f : 3.0f;
  return p;
}

// The turned queries in their own order [B, M, H, D], and the cache after the new rows: the calls apart.
bool by_parts(const lb2_attention_step_args& step, const Problem& p, std::vector<char>& output) {
  const int64_t bytes = element_bytes(p.dtype), tokens = p.batch * p.queries;
  std::vector<char> query(static_cast<size_t>(tokens * p.heads * p.size * bytes + 1));
  std::vector<char> key(static_cast<size_t>(tokens * p.kv_heads * p.size * bytes + 1));
  lb2_rotary_args turn = {};
  turn.struct_size = sizeof turn;
  turn.batch = p.batch;
  turn.tokens = p.queries;
  turn.heads = p.heads;
  turn.kv_heads = p.kv_heads;
  turn.head_size = p.size;
  turn.rotary_size = p.rotary_size;
  turn.query = step.query;
  turn.key = step.new_key;
  turn.cos = step.cos;
  turn.sin = step.sin;
  std::memcpy(turn.query_strides, step.query_strides, sizeof turn.query_strides);
  std::memcpy(turn.key_strides, step.new_key_strides, sizeof turn.key_strides);
  std::memcpy(turn.cos_strides, step.cos_strides, sizeof turn.cos_strides);
  std::memcpy(turn.sin_strides, step.sin_strides, sizeof turn.sin_strides);
  turn.query_out = query.data();
  turn.key_out = key.data();
  turn.dtype = p.dtype;
  turn.angle_dtype = p.angle_dtype;
  turn.interleaved = p.interleaved;
  turn.isa = step.isa;
  if (lb2_rotary_forward_cpu(&turn) != LB2_OK) return false;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t g = 0; g < p.kv_heads; ++g)
      for (int64_t m = 0; m < p.queries; ++m) {
        const auto row = [&](const void* data, const int64_t (&strides)[3], int64_t i) {
          return static_cast<char*>(const_cast<void*>(data)) +
                 (b * strides[0] + g * strides[1] + i * strides[2]) * bytes;
        };
        std::memcpy(row(step.key, step.key_strides, p.position + m),
                    key.data() + (((b * p.queries + m) * p.kv_heads) + g) * p.size * bytes,
                    static_cast<size_t>(p.size * bytes));
        std::memcpy(row(step.value, step.value_strides, p.position + m),
                    row(step.new_value, step.new_value_strides, m),
                    static_cast<size_t>(p.value_size * bytes));
      }
  lb2_attention_args args = {};
  args.struct_size = sizeof args;
  args.batch = p.batch;
  args.heads = p.heads;
  args.kv_heads = p.kv_heads;
  args.queries = p.queries;
  args.keys = p.keys;
  args.head_size = p.size;
  args.value_size = p.value_size;
  args.query = query.data();
  args.query_strides[0] = p.queries * p.heads * p.size;
  args.query_strides[1] = p.size;
  args.query_strides[2] = p.heads * p.size;
  args.key = step.key;
  args.value = step.value;
  args.mask = step.mask;
  args.output = output.data();
  std::memcpy(args.key_strides, step.key_strides, sizeof args.key_strides);
  std::memcpy(args.value_strides, step.value_strides, sizeof args.value_strides);
  std::memcpy(args.mask_strides, step.mask_strides, sizeof args.mask_strides);
  std::memcpy(args.output_strides, step.output_strides, sizeof args.output_strides);
  args.dtype = p.dtype;
  args.mask_dtype = step.mask_dtype;
  args.scale = step.scale;
  args.softcap = step.softcap;
  args.causal = step.causal;
  args.offset = p.position;
  args.window = step.window;
  args.isa = step.isa;
  int64_t needed = 0;
  if (lb2_attention_workspace_cpu(&args, &needed) != LB2_OK) return false;
  std::vector<char> workspace(static_cast<size_t>(needed + 1));
  args.workspace = workspace.data();
  args.workspace_bytes = needed;
  return lb2_attention_forward_cpu(&args) == LB2_OK;
}

bool run_problem(int index) {
  const Problem p = random_shape();
  const Heads query(p.dtype, p.batch, p.heads, p.queries, p.size);
  const Heads new_key(p.dtype, p.batch, p.kv_heads, p.queries, p.size);
  const Heads new_value(p.dtype, p.batch, p.kv_heads, p.queries, p.value_size);
  const Heads key(p.dtype, p.batch, p.kv_heads, p.keys, p.size);
  const Heads value(p.dtype, p.batch, p.kv_heads, p.keys, p.value_size);
  query.fill(p.batch, p.heads, p.queries, p.size);
  new_key.fill(p.batch, p.kv_heads, p.queries, p.size);
  new_value.fill(p.batch, p.kv_heads, p.queries, p.value_size);
  // Spare elements too: the bytes of a cache are compared as a whole.
  const int64_t key_bytes = key.bytes(p.batch, p.kv_heads, p.keys, p.size),
                value_bytes = value.bytes(p.batch, p.kv_heads, p.keys, p.value_size);
  std::memset(key.buffer.data, 0, static_cast<size_t>(key_bytes));
  std::memset(value.buffer.data, 0, static_cast<size_t>(value_bytes));
  key.fill(p.batch, p.kv_heads, p.keys, p.size);
  value.fill(p.batch, p.kv_heads, p.keys, p.value_size);
  const std::vector<char> key_before(key.buffer.data, key.buffer.data + key_bytes),
      value_before(value.buffer.data, value.buffer.data + value_bytes);
  const int64_t angles = (p.shared_angles ? 1 : p.batch) * p.queries * p.rotary_size;
  const Buffer cos(angles * element_bytes(p.angle_dtype), engine() % 2),
      sin(angles * element_bytes(p.angle_dtype), engine() % 2);
  for (int64_t i = 0; i < angles; ++i) {
    random_element(p.angle_dtype, cos.data + i * element_bytes(p.angle_dtype));
    random_element(p.angle_dtype, sin.data + i * element_bytes(p.angle_dtype));
  }
  const Buffer mask(p.batch * p.keys, engine() % 2);  // of all heads and queries
  for (int64_t i = 0; i < p.batch * p.keys; ++i) mask.data[i] = engine() % 3 != 0;

  lb2_attention_step_args args = {};
  args.struct_size = sizeof args;
  args.batch = p.batch;
  args.heads = p.heads;
  args.kv_heads = p.kv_heads;
  args.queries = p.queries;
  args.keys = p.keys;
  args.head_size = p.size;
  args.value_size = p.value_size;
  args.rotary_size = p.rotary_size;
  args.position = p.position;
  args.query = query.buffer.data;
  args.new_key = new_key.buffer.data;
  args.new_value = new_value.buffer.data;
  args.cos = cos.data;
  args.sin = sin.data;
  args.key = key.buffer.data;
  args.value = value.buffer.data;
  copy_strides(query, args.query_strides);
  copy_strides(new_key, args.new_key_strides);
  copy_strides(new_value, args.new_value_strides);
  copy_strides(key, args.key_strides);
  copy_strides(value, args.value_strides);
  args.cos_strides[0] = args.sin_strides[0] = p.shared_angles ? 0 : p.queries * p.rotary_size;
  args.cos_strides[1] = args.sin_strides[1] = p.rotary_size;
  if (p.masked) {
    args.mask = mask.data;
    args.mask_strides[0] = p.keys;
  }
  args.dtype = p.dtype;
  args.angle_dtype = p.angle_dtype;
  args.mask_dtype = LB2_INT8;
  args.interleaved = p.interleaved;
  args.scale = 0.25f;
  args.softcap = p.softcap;
  args.window = p.window;
  args.causal = p.causal;
  const int64_t outputs = p.batch * p.queries * p.heads * p.value_size * element_bytes(p.dtype);
  args.output_strides[0] = p.queries * p.heads * p.value_size;
  args.output_strides[1] = p.value_size;
  args.output_strides[2] = p.heads * p.value_size;

  std::vector<char> wanted(static_cast<size_t>(outputs + 1)), wanted_key, wanted_value;
  args.isa = LB2_ISA_SCALAR;
  if (!by_parts(args, p, wanted)) {
    std::fprintf(stderr, "problem %d, by parts: %s\n", index, lb2_last_error());
    return false;
  }
  add_to_digest(std::vector<char>(wanted.begin(), wanted.begin() + outputs));
  wanted_key.assign(key.buffer.data, key.buffer.data + key_bytes);
  wanted_value.assign(value.buffer.data, value.buffer.data + value_bytes);
  for (const lb2_isa isa : kIsas) {
    if (!lb2_cpu_isa_available(isa)) continue;
    args.isa = isa;
    std::copy(key_before.begin(), key_before.end(), key.buffer.data);
    std::copy(value_before.begin(), value_before.end(), value.buffer.data);
    const int64_t off = engine() % 2;
    const Buffer output(outputs, off);
    std::memset(output.data, 0x5A, static_cast<size_t>(outputs));
    args.output = output.data;
    args.parallel_for = engine() % 2 ? parallel_for : nullptr;
    args.num_threads = 2;
    int64_t needed = -1;
    if (lb2_attention_step_workspace_cpu(&args, &needed) != LB2_OK) return false;
    const Buffer workspace(needed, needed > 0 ? off : 0);
    args.workspace = workspace.data;
    args.workspace_bytes = needed;
    if (lb2_attention_step_forward_cpu(&args) != LB2_OK) {
      std::fprintf(stderr, "problem %d: %s: %s\n", index, lb2_isa_name(isa), lb2_last_error());
      return false;
    }
    if (std::memcmp(output.data, wanted.data(), static_cast<size_t>(outputs)) != 0 ||
        !std::equal(wanted_key.begin(), wanted_key.end(), key.buffer.data) ||
        !std::equal(wanted_value.begin(), wanted_value.end(), value.buffer.data)) {
      std::fprintf(stderr, "problem %d: %s and the calls apart differ in their bits\n", index,
                   lb2_isa_name(isa));
      return false;
    }
  }
  return true;
}

bool refuses(const char* part, void (*change)(lb2_attention_step_args*)) {
  static const float input[64] = {};
  static float cache[64], values[64], output[64];
  static char workspace[8192];
  lb2_attention_step_args args = {};
  args.struct_size = sizeof args;
  args.batch = args.kv_heads = args.queries = 1;
  args.heads = 2;
  args.keys = 3;
  args.position = 2;
  args.head_size = args.value_size = args.rotary_size = 4;
  args.query = args.new_key = args.new_value = args.cos = args.sin = input;
  args.key = cache;
  args.value = values;
  args.output = output;
  for (int64_t* strides : {args.query_strides, args.new_key_strides, args.new_value_strides, args.key_strides,
                           args.value_strides, args.output_strides})
    strides[1] = strides[2] = 4;
  args.scale = 1.0f;
  args.workspace = workspace;
  args.workspace_bytes = sizeof workspace;
  return refuses(lb2_attention_step_forward_cpu, args, part, change);
}

}  // namespace

int main(int argc, char** argv) {
  int failed = run_problems(argc, argv, problem_count(300), run_problem);
  using Args = lb2_attention_step_args;
  failed += !refuses("struct_size must equal", [](Args* args) { args->struct_size = 8; });
  failed += lb2_attention_step_forward_cpu(nullptr) != LB2_ERROR_INVALID_ARGUMENT;
  lb2_attention_step_args sizes = {};
  sizes.struct_size = sizeof sizes;
  sizes.heads = sizes.kv_heads = sizes.keys = sizes.value_size = 1;
  sizes.head_size = sizes.rotary_size = 2;
  failed += lb2_attention_step_workspace_cpu(&sizes, nullptr) != LB2_ERROR_INVALID_ARGUMENT;
  failed += !refuses("keys must be between 1", [](Args* args) { args->keys = 0; });
  failed += !refuses("multiple of kv_heads = 3", [](Args* args) { args->kv_heads = 3; });
  failed += !refuses("queries must be at most keys = 3, got 4", [](Args* args) { args->queries = 4; });
  failed += !refuses("position must be between 0 and 2, got 3", [](Args* args) { args->position = 3; });
  failed += !refuses("position must be between 0 and 2, got -1", [](Args* args) { args->position = -1; });
  failed += !refuses("rotary_size must be between 2 and 4, got 6", [](Args* args) { args->rotary_size = 6; });
  failed += !refuses("rotary_size must be even, got 3", [](Args* args) { args->rotary_size = 3; });
  failed += !refuses("head_size must be between 1 and 1024", [](Args* args) { args->head_size = 1025; });
  failed += !refuses("interleaved must be between 0 and 1", [](Args* args) { args->interleaved = 2; });
  failed += !refuses("angle_dtype must be", [](Args* args) { args->angle_dtype = LB2_INT8; });
  failed += !refuses("dtype must be", [](Args* args) { args->dtype = LB2_INT8; });
  failed += !refuses("window must be 0", [](Args* args) { args->window = 2; });
  failed += !refuses("key must not be NULL", [](Args* args) { args->key = nullptr; });
  failed += !refuses("new_key must not be NULL", [](Args* args) { args->new_key = nullptr; });
  failed += !refuses("new_value must not be NULL", [](Args* args) { args->new_value = nullptr; });
  failed += !refuses("cos must not be NULL", [](Args* args) { args->cos = nullptr; });
  failed += !refuses("sin_strides[0] must be", [](Args* args) { args->sin_strides[0] = -1; });
  failed += !refuses("new_value_strides[1] must be", [](Args* args) { args->new_value_strides[1] = -1; });
  failed += !refuses("value_strides[2] = ", [](Args* args) { args->value_strides[2] = INT64_MAX / 2; });
  failed += !refuses("workspace_bytes must be", [](Args* args) { args->workspace_bytes = 8; });
  std::printf("%d failed\n", failed);
  return failed == 0 ? 0 : 1;
}
