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

struct Words {
  const int32_t* data;
  int64_t stride;
};

Words words_data(const Name& name, const Tensor& words, int64_t rows, int64_t cols) {
  const int64_t per_row = lb2_words_per_row(cols);
  LB2_CHECK(words.is_cpu(), name, " must be on the CPU like x");
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

const float* scale_data(const Name& name, const Tensor& scale, int64_t size) {
  LB2_CHECK(scale.is_cpu(), name, " must be on the CPU like x");
  LB2_CHECK(scale.scalar_type() == ScalarType::Float, name, " must be float32, got ",
            torch::headeronly::toString(scale.scalar_type()));
  LB2_CHECK(is_vector(scale) && scale.numel() == size, name, " must have shape [", size, "] or [1, ", size,
            "], got ", shape_of(scale));
  LB2_CHECK(scale.is_contiguous(), name, " must be contiguous");
  return static_cast<const float*>(scale.const_data_ptr());
}

void set_layer(lb2_linear_args& args, Paths& paths, const std::vector<Tensor>& v, const OptionalTensors& u,
               const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
               const std::vector<Tensor>& out_scale) {
  const size_t count = v.size();
  const bool single_stage = !u.has_value();
  LB2_CHECK(count >= 1 && count <= LB2_MAX_PATHS, "v must hold between 1 and ", LB2_MAX_PATHS,
            " tensors, got ", count);
  check_length("in_scale", in_scale, count);
  check_length("out_scale", out_scale, count);
  LB2_CHECK(latent_scale.has_value() == !single_stage, "latent_scale must be given exactly when u is");
  if (!single_stage) {
    check_length("u", *u, count);
    check_length("latent_scale", *latent_scale, count);
  }
  LB2_CHECK(is_vector(in_scale[0]), "in_scale[0] must have shape [K] or [1, K], got ", shape_of(in_scale[0]));
  LB2_CHECK(is_vector(out_scale[0]), "out_scale[0] must have shape [N] or [1, N], got ",
            shape_of(out_scale[0]));
  args.k = in_scale[0].numel();
  args.n = out_scale[0].numel();
  LB2_CHECK(args.k >= 1, "in_scale[0] must not be empty");
  LB2_CHECK(args.n >= 1, "out_scale[0] must not be empty");
  for (size_t p = 0; p < count; ++p) {
    lb2_path& path = paths[p];
    path = {};
    path.in_scale = scale_data(Name{"in_scale", static_cast<int64_t>(p)}, in_scale[p], args.k);
    path.out_scale = scale_data(Name{"out_scale", static_cast<int64_t>(p)}, out_scale[p], args.n);
    LB2_CHECK(v[p].dim() == 2, Name{"v", static_cast<int64_t>(p)}, " must be two-dimensional, got ",
              shape_of(v[p]));
    path.rank = single_stage ? args.n : v[p].size(0);
    const Words v_words = words_data(Name{"v", static_cast<int64_t>(p)}, v[p], path.rank, args.k);
    path.v = v_words.data;
    path.v_stride = v_words.stride;
    if (single_stage) continue;
    const Words u_words = words_data(Name{"u", static_cast<int64_t>(p)}, (*u)[p], args.n, path.rank);
    path.u = u_words.data;
    path.u_stride = u_words.stride;
    path.latent_scale =
        scale_data(Name{"latent_scale", static_cast<int64_t>(p)}, (*latent_scale)[p], path.rank);
  }
  args.struct_size = sizeof args;
  args.paths = paths.data();
  args.num_paths = static_cast<int64_t>(count);
}

void throw_on_error(lb2_status status) { LB2_CHECK(status == LB2_OK, lb2_last_error()); }

Rows rows_of(const char* name, const Tensor& input, int64_t columns) {
  LB2_CHECK(input.is_cpu(), name, " must be on the CPU for this kernel");
  const lb2_dtype dtype = activation_dtype(name, input);
  const int64_t dims = input.dim();
  LB2_CHECK(dims >= 1 && input.size(dims - 1) == columns, name, ".size(-1) must equal ", columns,
            ", got shape ", shape_of(input));
  // Rows of a matrix may be apart; anything else is used if it is dense, and made so if it is not.
  const bool matrix = dims == 2 && (columns == 1 || input.stride(1) == 1);
  Tensor tensor = matrix || input.is_contiguous() ? input : torch::stable::contiguous(input);
  const int64_t stride = matrix ? tensor.stride(0) : columns;
  return {std::move(tensor), input.numel() / columns, stride, dtype};
}

Tensor new_output(const Tensor& input, int64_t columns) {
  // Through the C shim and not the dispatcher: this is on the way of every call.
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = columns;
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * std::max<int64_t>(1, shape[d]);
  AtenTensorHandle handle;
  int32_t dtype, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(input.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(input.dim(), shape.data(), strides.data(), dtype, device, 0, &handle));
  return Tensor(handle);
}

int32_t torch_parallel(void*, int64_t n, int64_t grain, lb2_task task, void* task_context) {
  return torch_parallel_for(0, n, grain, task, task_context);
}

}  // namespace lb2::torch_ops
