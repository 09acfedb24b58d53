#include "cuda/plan/shape.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "core/check.h"
#include "core/status.h"
#include "cuda/plan/check.h"

namespace lb2::cuda {

lb2_status name_layer(const char* list, int64_t num_layers, int64_t index, lb2_status status) noexcept {
  if (status == LB2_OK || num_layers == 1) return status;
  char message[512];  // a copy: the new message is written where the old one is
  std::snprintf(message, sizeof message, "%s", lb2_last_error());
  return fail(status, "%s[%" PRId64 "]: %s", list, index, message);
}

lb2_status start_shape(int64_t num_layers, int64_t m, lb2_dtype dtype, CallShape* call) noexcept {
  if (num_layers < 1 || num_layers > LB2_MAX_PATHS)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "num_layers must be between 1 and %d, got %" PRId64,
                LB2_MAX_PATHS, num_layers);
  *call = {};
  call->m = m;
  call->dtype = dtype;
  return LB2_OK;
}

lb2_status add_layer(const char* list, int64_t num_layers, const lb2_layer_shape& layer,
                     CallShape* call) noexcept {
  const int32_t index = call->num_layers;
  if (index == 0) {
    call->k = layer.k;
    call->single_stage = layer.single_stage;
  }
  if (layer.k != call->k)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "%s[%" PRId32 "].k must equal that of %s[0], %" PRId64 ", got %" PRId64, list, index, list,
                call->k, layer.k);
  if ((layer.single_stage != 0) != call->single_stage)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "%s[%" PRId32 "] must have %s like %s[0]", list, index,
                call->single_stage ? "a single stage" : "two stages", list);
  LB2_RETURN_IF_ERROR(name_layer(list, num_layers, index, check_sizes(layer)));
  if (call->num_paths + layer.num_paths > LB2_MAX_PATHS)
    return fail(LB2_ERROR_UNSUPPORTED,
                "%s must have at most %d paths in all, got %" PRId64 " by %s[%" PRId32 "]", list,
                LB2_MAX_PATHS, call->num_paths + layer.num_paths, list, index);
  add_first_stages(layer, call->num_paths, &call->first);
  std::copy_n(layer.ranks, layer.num_paths, call->ranks + call->num_paths);
  call->n[index] = layer.n;
  call->num_paths += static_cast<int32_t>(layer.num_paths);
  call->first_path[++call->num_layers] = call->num_paths;
  if (__builtin_add_overflow(call->macs, count_macs(layer, call->m), &call->macs)) call->macs = INT64_MAX;
  return LB2_OK;
}

lb2_status gather_shapes(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m, lb2_dtype dtype,
                         CallShape* call) noexcept {
  const char* const list = "shapes";
  LB2_RETURN_IF_ERROR(start_shape(num_layers, m, dtype, call));
  if (shapes == nullptr && num_layers != 1)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "shapes must not be NULL");
  LB2_RETURN_IF_ERROR(check_dtype(dtype));
  LB2_RETURN_IF_ERROR(check_tokens(m));
  for (int64_t i = 0; i < num_layers; ++i) {
    const lb2_layer_shape* shape = shapes == nullptr ? nullptr : shapes + i;
    LB2_RETURN_IF_ERROR(name_layer(list, num_layers, i, check_shape(shape)));
    LB2_RETURN_IF_ERROR(add_layer(list, num_layers, *shape, call));
  }
  return LB2_OK;
}

}  // namespace lb2::cuda
