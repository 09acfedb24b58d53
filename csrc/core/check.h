// The argument checks of the C ABI.
#pragma once

#include <cinttypes>

#include "core/status.h"
#include "littlebit2/littlebit2.h"

namespace lb2 {

// The arguments of a call, by the size that the caller's header gave them. type: the name of Args.
template <typename Args>
lb2_status check_args(const Args* args, const char* type) noexcept {
  if (args == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "args must not be NULL");
  if (args->struct_size == sizeof(Args)) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "args->struct_size must equal sizeof(%s) = %zu, got %" PRIu64
              " (header and library of different versions?)",
              type, sizeof(Args), args->struct_size);
}

// Most elements of a row that is rotated: rows are widened on the stack.
constexpr int64_t kMaxRotaryHead = 1024;

enum class Direction { kForward, kBackward };

// Tokens and element type of a call.
lb2_status check_tokens(int64_t m) noexcept;
lb2_status check_dtype(lb2_dtype dtype) noexcept;

// A normalization; NULL is none.
lb2_status check_norm(const lb2_norm* norm) noexcept;

// Columns of a matrix, in_features of a layer.
lb2_status check_columns(int64_t k) noexcept;

// A shape that a caller gave, its values included.
lb2_status check_shape(const lb2_layer_shape* shape) noexcept;

// A shape that is to be filled.
lb2_status check_shape_struct(const lb2_layer_shape* shape) noexcept;

// Everything in args that describes the layer, by the rules of check_shape, and m and dtype. Fills *shape.
// Does not check input, output and workspace.
lb2_status check_layer(const lb2_linear_args* args, lb2_layer_shape* shape) noexcept;

// Input, output and workspace of a call; check_layer must have passed.
lb2_status check_buffers(const lb2_linear_args& args, Direction direction, int64_t workspace_bytes) noexcept;

// The same for calls on a prepacked layer, whose bytes are checked where they are read.
lb2_status check_prepacked(const lb2_prepacked_args* args) noexcept;
lb2_status check_prepacked_buffers(const lb2_prepacked_args& args, int64_t k, int64_t n,
                                   int64_t workspace_bytes) noexcept;

// The same for calls on several prepacked layers; `n` holds the N of each layer.
lb2_status check_grouped(const lb2_grouped_args* args) noexcept;
lb2_status check_grouped_buffers(const lb2_grouped_args& args, int64_t k, const int64_t* n,
                                 int64_t workspace_bytes) noexcept;
lb2_status check_mlp(const lb2_mlp_args* args) noexcept;
lb2_status check_mlp_buffers(const lb2_mlp_args& args, int64_t k, int64_t n,
                             int64_t workspace_bytes) noexcept;

// Everything in args of an int8 layer but its buffers; then these.
lb2_status check_int8(const lb2_int8_args* args) noexcept;
lb2_status check_int8_buffers(const lb2_int8_args& args, int64_t workspace_bytes) noexcept;

// Everything in args of an attention call but its buffers; then these (attention.cpp).
lb2_status check_attention(const lb2_attention_args* args) noexcept;
lb2_status check_attention_buffers(const lb2_attention_args& args, int64_t workspace_bytes) noexcept;

// Everything in args of a rotary embedding (attention.cpp).
lb2_status check_rotary(const lb2_rotary_args* args) noexcept;

// The attention of a step.
lb2_attention_args attention_of(const lb2_attention_step_args& args) noexcept;

// Everything in args of a step but its buffers; then these (attention.cpp).
lb2_status check_attention_step(const lb2_attention_step_args* args) noexcept;
lb2_status check_attention_step_buffers(const lb2_attention_step_args& args,
                                        int64_t workspace_bytes) noexcept;

}  // namespace lb2
