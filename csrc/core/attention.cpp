// The argument checks of attention, of rotary embeddings, and of a step that has both.
#include <cinttypes>
#include <cmath>

#include "core/check.h"
#include "core/status.h"

namespace lb2 {
namespace {

constexpr int64_t kMaxDim = INT32_MAX;

struct Size {
  const char* name;
  int64_t got, low, high;
};

template <int kCount>
lb2_status check_sizes(const Size (&sizes)[kCount]) {
  for (const Size& size : sizes)
    if (size.got < size.low || size.got > size.high)
      return fail(LB2_ERROR_INVALID_ARGUMENT, "%s must be between %" PRId64 " and %" PRId64 ", got %" PRId64,
                  size.name, size.low, size.high, size.got);
  return LB2_OK;
}

// Whether the last element of a tensor of these sizes can be addressed.
lb2_status check_strides(const char* name, const int64_t (&sizes)[3], const int64_t (&strides)[3],
                         int64_t row) {
  int64_t extent = row;
  for (int i = 0; i < 3; ++i) {
    int64_t reach;
    if (strides[i] < 0)
      return fail(LB2_ERROR_INVALID_ARGUMENT, "%s_strides[%d] must be >= 0, got %" PRId64, name, i,
                  strides[i]);
    if (__builtin_mul_overflow(sizes[i] - 1, strides[i], &reach) ||
        __builtin_add_overflow(extent, reach, &extent) || extent > INT64_MAX / 4)
      return fail(LB2_ERROR_INVALID_ARGUMENT, "%s_strides[%d] = %" PRId64 " overflows the address range",
                  name, i, strides[i]);
  }
  return LB2_OK;
}

lb2_status check_null(const char* name, const void* pointer) {
  return pointer == nullptr ? fail(LB2_ERROR_INVALID_ARGUMENT, "%s must not be NULL", name) : LB2_OK;
}

// How rows turn. Args: of a rotation, or of a step that has one.
template <typename Args>
lb2_status check_turn(const Args& args) {
  LB2_RETURN_IF_ERROR(check_sizes({{"head_size", args.head_size, 1, kMaxRotaryHead},
                                   {"rotary_size", args.rotary_size, 2, args.head_size},
                                   {"interleaved", args.interleaved, 0, 1}}));
  if (args.rotary_size % 2 != 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "rotary_size must be even, got %" PRId64, args.rotary_size);
  if (check_dtype(args.angle_dtype) != LB2_OK)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "angle_dtype must be LB2_FLOAT32 (0), LB2_FLOAT16 (1) or LB2_BFLOAT16 (2), got %" PRId32,
                args.angle_dtype);
  return LB2_OK;
}

// The angles of `tokens` tokens.
template <typename Args>
lb2_status check_angles(const Args& args, int64_t tokens) {
  LB2_RETURN_IF_ERROR(check_null("cos", args.cos));
  LB2_RETURN_IF_ERROR(check_null("sin", args.sin));
  const int64_t sizes[3] = {args.batch, tokens, 1};
  const int64_t cos[3] = {args.cos_strides[0], args.cos_strides[1], 0};
  const int64_t sin[3] = {args.sin_strides[0], args.sin_strides[1], 0};
  LB2_RETURN_IF_ERROR(check_strides("cos", sizes, cos, args.rotary_size));
  return check_strides("sin", sizes, sin, args.rotary_size);
}

}  // namespace

lb2_status check_attention(const lb2_attention_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_args(args, "lb2_attention_args"));
  LB2_RETURN_IF_ERROR(check_sizes({{"batch", args->batch, 0, kMaxDim},
                                   {"heads", args->heads, 1, kMaxDim},
                                   {"kv_heads", args->kv_heads, 1, kMaxDim},
                                   {"queries", args->queries, 0, kMaxDim},
                                   {"keys", args->keys, 1, kMaxDim},
                                   {"head_size", args->head_size, 1, kMaxDim},
                                   {"value_size", args->value_size, 1, kMaxDim},
                                   {"window", args->window, 0, kMaxDim}}));
  if (args->heads % args->kv_heads != 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "heads must be a multiple of kv_heads = %" PRId64 ", got %" PRId64, args->kv_heads,
                args->heads);
  // In doubles, which do not overflow: products of these sizes are counted in 64 bits.
  const double heads = static_cast<double>(args->batch) * static_cast<double>(args->heads);
  const double elements = static_cast<double>(args->head_size) + static_cast<double>(args->value_size);
  const double most = heads * (static_cast<double>(args->keys) + 128.0) * (elements + 64.0) * 8.0;
  if (most > 0x1p60)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "batch * heads * keys * (head_size + value_size) must be below about 2^57, got %" PRId64
                " * %" PRId64 " * %" PRId64 " * (%" PRId64 " + %" PRId64 ")",
                args->batch, args->heads, args->keys, args->head_size, args->value_size);
  return LB2_OK;
}

lb2_status check_attention_buffers(const lb2_attention_args& args, int64_t workspace_bytes) noexcept {
  LB2_RETURN_IF_ERROR(check_dtype(args.dtype));
  if (args.causal != 0 && args.causal != 1)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "causal must be 0 or 1, got %" PRId32, args.causal);
  if (args.causal == 0 && args.window != 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "window must be 0 in a call that is not causal, got %" PRId64,
                args.window);
  if (args.causal == 1 && (args.offset < -kMaxDim || args.offset > kMaxDim))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "offset must be between %" PRId64 " and %" PRId64 ", got %" PRId64, -kMaxDim, kMaxDim,
                args.offset);
  if (!std::isfinite(args.scale))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "scale must be finite, got %g", static_cast<double>(args.scale));
  if (!(std::isfinite(args.softcap) && args.softcap >= 0.0f))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "softcap must be finite and >= 0, got %g",
                static_cast<double>(args.softcap));
  if (args.mask != nullptr && args.mask_dtype != LB2_INT8 && check_dtype(args.mask_dtype) != LB2_OK)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "mask_dtype must be LB2_FLOAT32 (0), LB2_FLOAT16 (1), LB2_BFLOAT16 (2) or LB2_INT8 (3), got "
                "%" PRId32,
                args.mask_dtype);
  if (args.batch == 0 || args.queries == 0) return LB2_OK;
  LB2_RETURN_IF_ERROR(check_null("query", args.query));
  LB2_RETURN_IF_ERROR(check_null("key", args.key));
  LB2_RETURN_IF_ERROR(check_null("value", args.value));
  LB2_RETURN_IF_ERROR(check_null("output", args.output));
  LB2_RETURN_IF_ERROR(check_null("workspace", args.workspace));
  const int64_t rows[3] = {args.batch, args.heads, args.queries};
  const int64_t kept[3] = {args.batch, args.kv_heads, args.keys};
  LB2_RETURN_IF_ERROR(check_strides("query", rows, args.query_strides, args.head_size));
  LB2_RETURN_IF_ERROR(check_strides("key", kept, args.key_strides, args.head_size));
  LB2_RETURN_IF_ERROR(check_strides("value", kept, args.value_strides, args.value_size));
  LB2_RETURN_IF_ERROR(check_strides("output", rows, args.output_strides, args.value_size));
  if (args.mask != nullptr) LB2_RETURN_IF_ERROR(check_strides("mask", rows, args.mask_strides, args.keys));
  if (args.workspace_bytes < workspace_bytes)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "workspace_bytes must be >= %" PRId64 ", got %" PRId64,
                workspace_bytes, args.workspace_bytes);
  return LB2_OK;
}

lb2_status check_rotary(const lb2_rotary_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_args(args, "lb2_rotary_args"));
  LB2_RETURN_IF_ERROR(check_sizes({{"batch", args->batch, 0, kMaxDim},
                                   {"tokens", args->tokens, 0, kMaxDim},
                                   {"heads", args->heads, 1, kMaxDim},
                                   {"kv_heads", args->kv_heads, 1, kMaxDim}}));
  LB2_RETURN_IF_ERROR(check_turn(*args));
  LB2_RETURN_IF_ERROR(check_dtype(args->dtype));
  if (args->batch == 0 || args->tokens == 0) return LB2_OK;
  LB2_RETURN_IF_ERROR(check_null("query", args->query));
  LB2_RETURN_IF_ERROR(check_null("key", args->key));
  LB2_RETURN_IF_ERROR(check_null("query_out", args->query_out));
  LB2_RETURN_IF_ERROR(check_null("key_out", args->key_out));
  LB2_RETURN_IF_ERROR(
      check_strides("query", {args->batch, args->heads, args->tokens}, args->query_strides, args->head_size));
  LB2_RETURN_IF_ERROR(
      check_strides("key", {args->batch, args->kv_heads, args->tokens}, args->key_strides, args->head_size));
  return check_angles(*args, args->tokens);
}

lb2_attention_args attention_of(const lb2_attention_step_args& args) noexcept {
  lb2_attention_args attention = {};
  attention.struct_size = sizeof attention;
  attention.batch = args.batch;
  attention.heads = args.heads;
  attention.kv_heads = args.kv_heads;
  attention.queries = args.queries;
  attention.keys = args.keys;
  attention.head_size = args.head_size;
  attention.value_size = args.value_size;
  attention.query = args.query;
  attention.key = args.key;
  attention.value = args.value;
  attention.output = args.output;
  attention.mask = args.mask;
  for (int i = 0; i < 3; ++i) {
    attention.query_strides[i] = args.query_strides[i];
    attention.key_strides[i] = args.key_strides[i];
    attention.value_strides[i] = args.value_strides[i];
    attention.output_strides[i] = args.output_strides[i];
    attention.mask_strides[i] = args.mask_strides[i];
  }
  attention.dtype = args.dtype;
  attention.mask_dtype = args.mask_dtype;
  attention.scale = args.scale;
  attention.softcap = args.softcap;
  attention.offset = args.causal == 1 ? args.position : 0;
  attention.window = args.window;
  attention.causal = args.causal;
  attention.isa = args.isa;
  attention.num_threads = args.num_threads;
  attention.workspace = args.workspace;
  attention.workspace_bytes = args.workspace_bytes;
  attention.parallel_for = args.parallel_for;
  attention.parallel_context = args.parallel_context;
  return attention;
}

lb2_status check_attention_step(const lb2_attention_step_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_args(args, "lb2_attention_step_args"));
  const lb2_attention_args attention = attention_of(*args);
  LB2_RETURN_IF_ERROR(check_attention(&attention));
  LB2_RETURN_IF_ERROR(check_turn(*args));
  if (args->queries > args->keys)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "queries must be at most keys = %" PRId64 ", got %" PRId64,
                args->keys, args->queries);
  return check_sizes({{"position", args->position, 0, args->keys - args->queries}});
}

lb2_status check_attention_step_buffers(const lb2_attention_step_args& args,
                                        int64_t workspace_bytes) noexcept {
  LB2_RETURN_IF_ERROR(check_attention_buffers(attention_of(args), workspace_bytes));
  if (args.batch == 0 || args.queries == 0) return LB2_OK;
  LB2_RETURN_IF_ERROR(check_null("new_key", args.new_key));
  LB2_RETURN_IF_ERROR(check_null("new_value", args.new_value));
  const int64_t rows[3] = {args.batch, args.kv_heads, args.queries};
  LB2_RETURN_IF_ERROR(check_strides("new_key", rows, args.new_key_strides, args.head_size));
  LB2_RETURN_IF_ERROR(check_strides("new_value", rows, args.new_value_strides, args.value_size));
  return check_angles(args, args.queries);
}

}  // namespace lb2
