#include "torch/arguments.h"

#include <algorithm>

namespace lb2::torch_ops {

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

namespace {

lb2_dtype activation_dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return LB2_FLOAT32;
    case ScalarType::Half:
      return LB2_FLOAT16;
    case ScalarType::BFloat16:
      return LB2_BFLOAT16;
    default:
      LB2_CHECK(false, name, " must be float32, float16 or bfloat16, got ",
                torch::headeronly::toString(tensor.scalar_type()));
      return LB2_FLOAT32;
  }
}

// [size], or [1, size] as checkpoints store them.
bool is_vector(const Tensor& tensor) {
  return tensor.dim() == 1 || (tensor.dim() == 2 && tensor.size(0) == 1);
}

// The device of a tensor, for messages.
std::string place_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "the CPU";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

void check_place(const Name& name, const Tensor& tensor, const Place& place) {
  if (place.cpu) {
    LB2_CHECK(tensor.is_cpu(), name, " must be on the CPU like x, got ", place_of(tensor));
  } else {
    LB2_CHECK(tensor.is_cuda() && tensor.get_device_index() == place.gpu, name,
              " must be on cuda:", place.gpu, " like x, got ", place_of(tensor));
  }
}

struct Words {
  const int32_t* data;
  int64_t stride;
};

Words words_data(const Name& name, const Tensor& words, int64_t rows, int64_t cols, const Place& place) {
  const int64_t per_row = lb2_words_per_row(cols);
  check_place(name, words, place);
  LB2_CHECK(words.scalar_type() == ScalarType::Int, name, " must be int32 words, got ",
            torch::headeronly::toString(words.scalar_type()));
  LB2_CHECK(words.dim() == 2 && words.size(0) == rows && words.size(1) == per_row, name, " must have shape [",
            rows, ", ", per_row, "] (", cols, " signs per row in 32-bit words), got ", shape_of(words));
  LB2_CHECK(per_row == 1 || words.stride(1) == 1, name, " must have contiguous rows, got stride ",
            words.stride(1));
  return {static_cast<const int32_t*>(words.const_data_ptr()), rows == 1 ? per_row : words.stride(0)};
}

void check_length(const char* name, const std::vector<Tensor>& list, size_t expected) {
  LB2_CHECK(list.size() == expected, name, " must hold one tensor per path (", expected, "), got ",
            list.size());
}

}  // namespace

const float* scale_data(const Name& name, const Tensor& scale, int64_t size, const Place& place) {
  check_place(name, scale, place);
  LB2_CHECK(scale.scalar_type() == ScalarType::Float, name, " must be float32, got ",
            torch::headeronly::toString(scale.scalar_type()));
  LB2_CHECK(is_vector(scale) && scale.numel() == size, name, " must have shape [", size, "] or [1, ", size,
            "], got ", shape_of(scale));
  LB2_CHECK(scale.is_contiguous(), name, " must be contiguous");
  return static_cast<const float*>(scale.const_data_ptr());
}

LayerTensors all_paths(const std::vector<Tensor>& v, const OptionalTensors& u,
                       const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                       const std::vector<Tensor>& out_scale) {
  LB2_CHECK(!v.empty(), "v must hold between 1 and ", LB2_MAX_PATHS, " tensors, got 0");
  check_length("in_scale", in_scale, v.size());
  check_length("out_scale", out_scale, v.size());
  LB2_CHECK(latent_scale.has_value() == u.has_value(), "latent_scale must be given exactly when u is");
  if (u) {
    check_length("u", *u, v.size());
    check_length("latent_scale", *latent_scale, v.size());
  }
  return {v, u, in_scale, latent_scale, out_scale, 0, v.size()};
}

void set_layer(lb2_linear_args& args, lb2_path* paths, const LayerTensors& tensors, const Place& place) {
  const bool single_stage = !tensors.u.has_value();
  LB2_CHECK(tensors.count >= 1 && tensors.count <= LB2_MAX_PATHS, "v must hold between 1 and ", LB2_MAX_PATHS,
            " tensors, got ", tensors.count);
  const auto named = [&](const char* text, size_t p) {
    return Name{text, static_cast<int64_t>(tensors.first + p)};
  };
  const auto size_of = [&](const char* text, const Tensor& scale, const char* dim) {
    LB2_CHECK(is_vector(scale), named(text, 0), " must have shape [", dim, "] or [1, ", dim, "], got ",
              shape_of(scale));
    LB2_CHECK(scale.numel() >= 1, named(text, 0), " must not be empty");
    return scale.numel();
  };
  args.k = size_of("in_scale", tensors.in_scale[tensors.first], "K");
  args.n = size_of("out_scale", tensors.out_scale[tensors.first], "N");
  for (size_t p = 0; p < tensors.count; ++p) {
    const size_t at = tensors.first + p;
    lb2_path& path = paths[p];
    path = {};
    path.in_scale = scale_data(named("in_scale", p), tensors.in_scale[at], args.k, place);
    path.out_scale = scale_data(named("out_scale", p), tensors.out_scale[at], args.n, place);
    const Tensor& v = tensors.v[at];
    LB2_CHECK(v.dim() == 2, named("v", p), " must be two-dimensional, got ", shape_of(v));
    path.rank = single_stage ? args.n : v.size(0);
    const Words v_words = words_data(named("v", p), v, path.rank, args.k, place);
    path.v = v_words.data;
    path.v_stride = v_words.stride;
    if (single_stage) continue;
    const Words u_words = words_data(named("u", p), (*tensors.u)[at], args.n, path.rank, place);
    path.u = u_words.data;
    path.u_stride = u_words.stride;
    path.latent_scale = scale_data(named("latent_scale", p), (*tensors.latent_scale)[at], path.rank, place);
  }
  args.struct_size = sizeof args;
  args.paths = paths;
  args.num_paths = static_cast<int64_t>(tensors.count);
}

void throw_on_error(lb2_status status) { LB2_CHECK(status == LB2_OK, lb2_last_error()); }

lb2_layer_shape shape_of_layer(const lb2_linear_args& args) {
  lb2_layer_shape shape;
  shape.struct_size = sizeof shape;
  throw_on_error(lb2_linear_shape(&args, &shape));
  return shape;
}

lb2_activation activation_mode(int64_t activation) {
  LB2_CHECK(activation >= LB2_ACTIVATION_AUTO && activation <= LB2_ACTIVATION_FLOAT16,
            "activation must be between ", LB2_ACTIVATION_AUTO, " and ", LB2_ACTIVATION_FLOAT16, ", got ",
            activation);
  return static_cast<lb2_activation>(activation);
}

Rows rows_of(const char* name, const Tensor& input, int64_t columns, const Place& place) {
  LB2_CHECK(place.cpu ? input.is_cpu() : input.is_cuda(), name, " must be on ",
            place.cpu ? "the CPU" : "a GPU", " for this kernel, got ", place_of(input));
  const lb2_dtype dtype = activation_dtype(name, input);
  const int64_t dims = input.dim();
  LB2_CHECK(dims >= 1 && input.size(dims - 1) == columns, name, ".size(-1) must equal ", columns,
            ", got shape ", shape_of(input));
  // A matrix may have padded rows. Any other tensor is used as it is if dense, else copied.
  const bool matrix = dims == 2 && (columns == 1 || input.stride(1) == 1);
  Tensor tensor = matrix || input.is_contiguous() ? input : torch::stable::contiguous(input);
  const int64_t stride = matrix ? tensor.stride(0) : columns;
  return {std::move(tensor), input.numel() / columns, stride, dtype};
}

namespace {

// Uses the C shim, not the dispatcher, because every call gets here.
Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape, int32_t dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(1, shape[d]);
  AtenTensorHandle handle;
  int32_t device, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), dtype, device, index, &handle));
  return Tensor(handle);
}

}  // namespace

Tensor new_output(const Tensor& input, int64_t columns) {
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = columns;
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
  return new_empty(input, shape, dtype);
}

Tensor new_bytes(const Tensor& input, int64_t bytes) {
  return new_empty(input, {bytes}, aoti_torch_dtype_uint8());
}

int32_t torch_parallel(void*, int64_t n, int64_t grain, lb2_task task, void* task_context) {
  return torch_parallel_for(0, n, grain, task, task_context);
}

}  // namespace lb2::torch_ops
