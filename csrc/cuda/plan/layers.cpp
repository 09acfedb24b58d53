#include "cuda/plan/layers.h"

#include <cinttypes>
#include <cstdio>

#include "core/check.h"
#include "core/status.h"
#include "cuda/plan/check.h"

namespace lb2::cuda {
namespace {

// Says of which of several layers a message is.
lb2_status name_layer(lb2_status status, int64_t index, int64_t count) {
  if (status == LB2_OK || count == 1) return status;
  char message[512];  // apart: the new one is written where the old one is
  std::snprintf(message, sizeof message, "%s", lb2_last_error());
  return fail(status, "layers[%" PRId64 "]: %s", index, message);
}

lb2_status differs(int64_t index, const char* name, int64_t expected, int64_t got) {
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "layers[%" PRId64 "].%s must equal that of layers[0], %" PRId64 ", got %" PRId64, index, name,
              expected, got);
}

// The first layer's are those of the call.
lb2_status check_same(const lb2_linear_args& first, const lb2_linear_args& other, int64_t index) {
  if (other.m != first.m) return differs(index, "m", first.m, other.m);
  if (other.k != first.k) return differs(index, "k", first.k, other.k);
  if (other.dtype != first.dtype) return differs(index, "dtype", first.dtype, other.dtype);
  if (other.input_stride != first.input_stride)
    return differs(index, "input_stride", first.input_stride, other.input_stride);
  if (other.input != first.input)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "layers[%" PRId64 "].input must be that of layers[0], %p, got %p",
                index, first.input, other.input);
  if ((other.paths[0].u == nullptr) != (first.paths[0].u == nullptr))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "layers[%" PRId64 "] must have %s like layers[0]", index,
                first.paths[0].u == nullptr ? "a single stage" : "two stages");
  return LB2_OK;
}

}  // namespace

lb2_status gather_layers(const lb2_linear_args* args, int64_t count, Layers* layers) noexcept {
  if (args == nullptr && count != 1) return fail(LB2_ERROR_INVALID_ARGUMENT, "layers must not be NULL");
  if (count < 1 || count > LB2_MAX_PATHS)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "num_layers must be between 1 and %d, got %" PRId64,
                LB2_MAX_PATHS, count);
  *layers = {};
  layers->args = args;
  layers->count = static_cast<int32_t>(count);
  for (int64_t i = 0; i < count; ++i) {
    LB2_RETURN_IF_ERROR(name_layer(check_layer(args == nullptr ? nullptr : args + i), i, count));
    LB2_RETURN_IF_ERROR(check_same(args[0], args[i], i));
    LB2_RETURN_IF_ERROR(name_layer(check_sizes(args[i]), i, count));
    if (layers->num_paths + args[i].num_paths > LB2_MAX_PATHS)
      return fail(LB2_ERROR_UNSUPPORTED,
                  "layers must have at most %d paths in all, got %" PRId64 " by layers[%" PRId64 "]",
                  LB2_MAX_PATHS, layers->num_paths + args[i].num_paths, i);
    for (int64_t p = 0; p < args[i].num_paths; ++p) layers->paths[layers->num_paths++] = args[i].paths + p;
    layers->first_path[i + 1] = layers->num_paths;
  }
  layers->single_stage = args[0].paths[0].u == nullptr;
  return LB2_OK;
}

lb2_status check_data(const Layers& layers, int64_t workspace_bytes) noexcept {
  for (int32_t i = 0; i < layers.count; ++i) {
    // The workspace is the first layer's.
    const int64_t bytes = i == 0 ? workspace_bytes : 0;
    LB2_RETURN_IF_ERROR(
        name_layer(check_buffers(layers.args[i], Direction::kForward, bytes), i, layers.count));
    LB2_RETURN_IF_ERROR(name_layer(check_addresses(layers.args[i]), i, layers.count));
  }
  return LB2_OK;
}

FirstStages find_first_stages(const Layers& layers) noexcept {
  return lb2::find_first_stages(layers.paths, layers.num_paths);
}

int64_t count_macs(const Layers& layers) noexcept {
  int64_t macs = 0;
  bool overflow = false;
  for (int32_t i = 0; i < layers.count; ++i) {
    const lb2_linear_args& args = layers.args[i];
    overflow =
        __builtin_add_overflow(macs, lb2::count_macs(args, lb2::find_first_stages(args)), &macs) || overflow;
  }
  return overflow ? INT64_MAX : macs;
}

}  // namespace lb2::cuda
