#include "cuda/plan/layers.h"

#include <cinttypes>

#include "core/check.h"
#include "core/status.h"
#include "cuda/plan/check.h"

namespace lb2::cuda {
namespace {

constexpr char kList[] = "layers";

lb2_status differs(int64_t index, const char* name, int64_t expected, int64_t got) {
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "layers[%" PRId64 "].%s must equal that of layers[0], %" PRId64 ", got %" PRId64, index, name,
              expected, got);
}

// The call takes these from the first layer.
lb2_status check_same_input(const lb2_linear_args& first, const lb2_linear_args& other, int64_t index) {
  if (other.m != first.m) return differs(index, "m", first.m, other.m);
  if (other.dtype != first.dtype) return differs(index, "dtype", first.dtype, other.dtype);
  if (other.input_stride != first.input_stride)
    return differs(index, "input_stride", first.input_stride, other.input_stride);
  if (other.input != first.input)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "layers[%" PRId64 "].input must be that of layers[0], %p, got %p",
                index, first.input, other.input);
  return LB2_OK;
}

}  // namespace

lb2_status gather_layers(const lb2_linear_args* args, int64_t count, Layers* layers) noexcept {
  LB2_RETURN_IF_ERROR(start_shape(count, 0, LB2_FLOAT32, &layers->shape));
  if (args == nullptr && count != 1) return fail(LB2_ERROR_INVALID_ARGUMENT, "layers must not be NULL");
  layers->args = args;
  layers->extras = {};
  for (int64_t i = 0; i < count; ++i) {
    lb2_layer_shape shape;
    LB2_RETURN_IF_ERROR(
        name_layer(kList, count, i, check_layer(args == nullptr ? nullptr : args + i, &shape)));
    if (i == 0) {
      layers->shape.m = args[0].m;
      layers->shape.dtype = args[0].dtype;
    }
    LB2_RETURN_IF_ERROR(check_same_input(args[0], args[i], i));
    LB2_RETURN_IF_ERROR(add_layer(kList, count, shape, &layers->shape));
    if (i == 0) {
      layers->input = args[0].input;
      layers->input_stride = args[0].input_stride;
      layers->input_dtype = args[0].dtype;
    }
    const int32_t first = layers->shape.first_path[i];
    for (int64_t p = 0; p < args[i].num_paths; ++p) layers->paths[first + p] = args[i].paths + p;
  }
  return LB2_OK;
}

lb2_status add_extras(const lb2_cuda_extras& extras, Layers* layers) noexcept {
  if (extras.struct_size != sizeof(lb2_cuda_extras))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "extras->struct_size must equal sizeof(lb2_cuda_extras) = %zu, got %" PRIu64,
                sizeof(lb2_cuda_extras), extras.struct_size);
  LB2_RETURN_IF_ERROR(check_norm(extras.norm));
  if (extras.norm != nullptr)
    LB2_RETURN_IF_ERROR(check_address("norm->weight", -1, extras.norm->weight,
                                      static_cast<uintptr_t>(element_bytes(extras.norm->dtype))));
  layers->extras.norm = extras.norm;
  layers->shape.normed = extras.norm != nullptr;
  if (extras.residual == nullptr) return LB2_OK;
  const lb2_linear_args& args = layers->front();
  if (layers->shape.num_layers != 1)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "residual must be NULL where there is more than one layer, got one with %" PRId32 " layers",
                layers->shape.num_layers);
  if (args.m > 1 && extras.residual_stride < 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "residual_stride must be >= 0, got %" PRId64,
                extras.residual_stride);
  LB2_RETURN_IF_ERROR(
      check_address("residual", -1, extras.residual, static_cast<uintptr_t>(element_bytes(args.dtype))));
  layers->extras.residual = extras.residual;
  layers->extras.residual_stride = extras.residual_stride;
  return LB2_OK;
}

lb2_status check_data(const Layers& layers, int64_t workspace_bytes) noexcept {
  const int32_t count = layers.shape.num_layers;
  for (int32_t i = 0; i < count; ++i) {
    // The workspace is the first layer's.
    const int64_t bytes = i == 0 ? workspace_bytes : 0;
    LB2_RETURN_IF_ERROR(
        name_layer(kList, count, i, check_buffers(layers.args[i], Direction::kForward, bytes)));
    LB2_RETURN_IF_ERROR(name_layer(kList, count, i, check_addresses(layers.args[i])));
  }
  return LB2_OK;
}

}  // namespace lb2::cuda
