// The argument checks of attention.
#include <cinttypes>
#include <cmath>

#include "core/check.h"
#include "core/status.h"

namespace lb2 {
namespace {

constexpr int64_t kMaxDim = INT32_MAX;

struct Size {
  const char* name;
  int64_t got, low;
};

lb2_status check_sizes(const lb2_attention_args& args) {
  const Size sizes[] = {
      {"batch", args.batch, 0},           {"heads", args.heads, 1},  {"kv_heads", args.kv_heads, 1},
      {"queries", args.queries, 0},       {"keys", args.keys, 1},    {"head_size", args.head_size, 1},
      {"value_size", args.value_size, 1}, {"window", args.window, 0}};
  for (const Size& size : sizes)
    if (size.got < size.low || size.got > kMaxDim)
      return fail(LB2_ERROR_INVALID_ARGUMENT, "%s must be between %" PRId64 " and %" PRId64 ", got %" PRId64,
                  size.name, size.low, kMaxDim, size.got);
  if (args.heads % args.kv_heads != 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "heads must be a multiple of kv_heads = %" PRId64 ", got %" PRId64, args.kv_heads,
                args.heads);
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

}  // namespace

lb2_status check_attention(const lb2_attention_args* args) noexcept {
  if (args == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "args must not be NULL");
  if (args->struct_size != sizeof(lb2_attention_args))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "args->struct_size must equal sizeof(lb2_attention_args) = %zu, got %" PRIu64
                " (header and library of different versions?)",
                sizeof(lb2_attention_args), args->struct_size);
  return check_sizes(*args);
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

}  // namespace lb2
