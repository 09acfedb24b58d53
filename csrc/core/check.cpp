#include "core/check.h"

#include <cinttypes>
#include <cstdio>

#include "core/shape.h"
#include "core/status.h"

namespace lb2 {
namespace {

constexpr int64_t kMaxDim = INT32_MAX;

lb2_status invalid_size(const char* name, int64_t got, int64_t low) {
  return fail(LB2_ERROR_INVALID_ARGUMENT, "%s must be between %" PRId64 " and %" PRId64 ", got %" PRId64,
              name, low, kMaxDim, got);
}

lb2_status check_workspace(const void* workspace, int64_t got, int64_t needed) {
  if (workspace == nullptr && needed > 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "workspace must not be NULL");
  if (got < needed)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "workspace_bytes must be >= %" PRId64 ", got %" PRId64, needed,
                got);
  return LB2_OK;
}

lb2_status null_path_field(int64_t path, const char* field) {
  return fail(LB2_ERROR_INVALID_ARGUMENT, "paths[%" PRId64 "].%s must not be NULL", path, field);
}

lb2_status check_stride(int64_t path, const char* field, int64_t stride, int64_t words, int64_t rows) {
  int64_t extent;
  if (stride < words)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "paths[%" PRId64 "].%s must be >= %" PRId64 " words, got %" PRId64, path, field, words,
                stride);
  if (__builtin_mul_overflow(stride, rows, &extent) ||
      __builtin_mul_overflow(extent, LB2_WORD_BITS / 8, &extent))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "paths[%" PRId64 "].%s = %" PRId64 " overflows the address range",
                path, field, stride);
  return LB2_OK;
}

lb2_status check_path_count(int64_t num_paths) {
  if (num_paths >= 1 && num_paths <= LB2_MAX_PATHS) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT, "num_paths must be between 1 and %d, got %" PRId64, LB2_MAX_PATHS,
              num_paths);
}

// What the rank of a path is called in messages: the field of the argument that it was given in.
struct RankName {
  char text[32];
  RankName(bool of_args, int path) {
    std::snprintf(text, sizeof text, of_args ? "paths[%d].rank" : "ranks[%d]", path);
  }
};

lb2_status check_rank(const lb2_layer_shape& shape, bool of_args, int path) {
  const int64_t rank = shape.ranks[path];
  if (rank < 1 || rank > kMaxDim) return invalid_size(RankName(of_args, path).text, rank, 1);
  if (shape.single_stage && rank != shape.n)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "%s must equal n = %" PRId64 " for a single-stage path, got %" PRId64,
                RankName(of_args, path).text, shape.n, rank);
  if (!shape.single_stage && rank % LB2_RANK_MULTIPLE != 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "%s must be a multiple of %d, got %" PRId64,
                RankName(of_args, path).text, LB2_RANK_MULTIPLE, rank);
  return LB2_OK;
}

// The values of a shape whose num_paths is in range. `of_args`: it is that of an lb2_linear_args.
lb2_status check_values(const lb2_layer_shape& shape, bool of_args) {
  if (shape.k < 1 || shape.k > kMaxDim) return invalid_size("k", shape.k, 1);
  if (shape.n < 1 || shape.n > kMaxDim) return invalid_size("n", shape.n, 1);
  if (shape.single_stage != 0 && shape.single_stage != 1)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "single_stage must be 0 or 1, got %" PRId32, shape.single_stage);
  for (int p = 0; p < static_cast<int>(shape.num_paths); ++p) {
    LB2_RETURN_IF_ERROR(check_rank(shape, of_args, p));
    const int32_t leader = shape.shares[p];
    if (leader == p) continue;
    if (leader < 0 || leader > p || shape.shares[leader] != leader || shape.ranks[leader] != shape.ranks[p])
      return fail(LB2_ERROR_INVALID_ARGUMENT,
                  "shares[%d] must name path %d itself or an earlier unshared path of rank %" PRId64
                  ", got %" PRId32,
                  p, p, shape.ranks[p], leader);
  }
  return LB2_OK;
}

// Which of a path's pointers are NULL says how many stages there are.
lb2_status check_stages(const lb2_linear_args& args, int64_t index) {
  const lb2_path& path = args.paths[index];
  const bool single_stage = path.u == nullptr;
  if (single_stage != (args.paths[0].u == nullptr))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "paths[%" PRId64 "].u must be %s like paths[0].u", index,
                single_stage ? "given" : "NULL");
  if (single_stage != (path.latent_scale == nullptr))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "paths[%" PRId64 "].latent_scale must be NULL exactly when u is NULL", index);
  return LB2_OK;
}

lb2_status check_operands(const lb2_linear_args& args, int64_t index) {
  const lb2_path& path = args.paths[index];
  if (path.v == nullptr) return null_path_field(index, "v");
  if (path.in_scale == nullptr) return null_path_field(index, "in_scale");
  if (path.out_scale == nullptr) return null_path_field(index, "out_scale");
  LB2_RETURN_IF_ERROR(check_stride(index, "v_stride", path.v_stride, lb2_words_per_row(args.k), path.rank));
  if (path.u == nullptr) return LB2_OK;
  return check_stride(index, "u_stride", path.u_stride, lb2_words_per_row(path.rank), args.n);
}

lb2_status check_rows(const char* name, const void* data, int64_t rows, int64_t cols, int64_t stride,
                      int64_t least_stride, int64_t element_bytes) {
  int64_t extent;
  if (data == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "%s must not be NULL", name);
  if (rows > 1 && stride < least_stride)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "%s_stride must be >= %" PRId64 ", got %" PRId64, name,
                least_stride, stride);
  if (rows > 1 &&
      (__builtin_mul_overflow(rows - 1, stride, &extent) || __builtin_add_overflow(extent, cols, &extent) ||
       __builtin_mul_overflow(extent, element_bytes, &extent)))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "%s_stride = %" PRId64 " overflows the address range", name,
                stride);
  return LB2_OK;
}

// Tokens, element type and activation of a call on prepacked layers.
template <typename Args>
lb2_status check_mode(const Args& args) {
  LB2_RETURN_IF_ERROR(check_dtype(args.dtype));
  LB2_RETURN_IF_ERROR(check_tokens(args.m));
  if ((args.activation >= LB2_ACTIVATION_AUTO && args.activation <= LB2_ACTIVATION_SIGN) ||
      args.activation == LB2_ACTIVATION_INT8X2)
    return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "activation must be LB2_ACTIVATION_AUTO (0), _EXACT (1), _INT16 (2), _INT8 (3), _SIGN (4) or "
              "_INT8X2 (6), got %" PRId32,
              args.activation);
}

// What all calls on several prepacked layers have in common.
template <typename Args>
lb2_status check_fused(const Args* args, const char* type, int64_t fewest, int64_t most) {
  LB2_RETURN_IF_ERROR(check_args(args, type));
  LB2_RETURN_IF_ERROR(check_mode(*args));
  if (args->num_layers < fewest || args->num_layers > most)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "num_layers must be between %" PRId64 " and %" PRId64 ", got %" PRId64, fewest, most,
                args->num_layers);
  if (args->layers == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "layers must not be NULL");
  return LB2_OK;
}

}  // namespace

lb2_status check_norm(const lb2_norm* norm) noexcept {
  if (norm == nullptr) return LB2_OK;
  if (norm->weight == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "norm->weight must not be NULL");
  if (norm->dtype != LB2_FLOAT32 && norm->dtype != LB2_FLOAT16 && norm->dtype != LB2_BFLOAT16)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "norm->dtype must be LB2_FLOAT32 (0), LB2_FLOAT16 (1) or LB2_BFLOAT16 (2), got %" PRId32,
                norm->dtype);
  if (!(norm->eps >= 0.0f && norm->eps <= __FLT_MAX__))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "norm->eps must be finite and >= 0, got %g",
                static_cast<double>(norm->eps));
  if (!(norm->offset >= -__FLT_MAX__ && norm->offset <= __FLT_MAX__))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "norm->offset must be finite, got %g",
                static_cast<double>(norm->offset));
  return LB2_OK;
}

lb2_status check_tokens(int64_t m) noexcept {
  return m < 0 || m > kMaxDim ? invalid_size("m", m, 0) : LB2_OK;
}

lb2_status check_dtype(lb2_dtype dtype) noexcept {
  if (dtype == LB2_FLOAT32 || dtype == LB2_FLOAT16 || dtype == LB2_BFLOAT16) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "dtype must be LB2_FLOAT32 (0), LB2_FLOAT16 (1) or LB2_BFLOAT16 (2), got %" PRId32, dtype);
}

lb2_status check_columns(int64_t k) noexcept {
  return k < 1 || k > kMaxDim ? invalid_size("k", k, 1) : LB2_OK;
}

lb2_status check_shape_struct(const lb2_layer_shape* shape) noexcept {
  if (shape == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "shape must not be NULL");
  if (shape->struct_size == sizeof(lb2_layer_shape)) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "shape->struct_size must equal sizeof(lb2_layer_shape) = %zu, got %" PRIu64,
              sizeof(lb2_layer_shape), shape->struct_size);
}

lb2_status check_shape(const lb2_layer_shape* shape) noexcept {
  LB2_RETURN_IF_ERROR(check_shape_struct(shape));
  LB2_RETURN_IF_ERROR(check_path_count(shape->num_paths));
  return check_values(*shape, false);
}

lb2_status check_layer(const lb2_linear_args* args, lb2_layer_shape* shape) noexcept {
  LB2_RETURN_IF_ERROR(check_args(args, "lb2_linear_args"));
  LB2_RETURN_IF_ERROR(check_dtype(args->dtype));
  LB2_RETURN_IF_ERROR(check_tokens(args->m));
  if (args->paths == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "paths must not be NULL");
  LB2_RETURN_IF_ERROR(check_path_count(args->num_paths));
  for (int64_t p = 0; p < args->num_paths; ++p) LB2_RETURN_IF_ERROR(check_stages(*args, p));
  *shape = shape_of(*args);
  LB2_RETURN_IF_ERROR(check_values(*shape, true));
  for (int64_t p = 0; p < args->num_paths; ++p) LB2_RETURN_IF_ERROR(check_operands(*args, p));
  return LB2_OK;
}

lb2_status check_buffers(const lb2_linear_args& args, Direction direction, int64_t workspace_bytes) noexcept {
  if (args.m == 0) return LB2_OK;
  const int64_t in_cols = direction == Direction::kForward ? args.k : args.n;
  const int64_t out_cols = direction == Direction::kForward ? args.n : args.k;
  const int64_t bytes = element_bytes(args.dtype);
  LB2_RETURN_IF_ERROR(check_rows("input", args.input, args.m, in_cols, args.input_stride, 0, bytes));
  LB2_RETURN_IF_ERROR(
      check_rows("output", args.output, args.m, out_cols, args.output_stride, out_cols, bytes));
  return check_workspace(args.workspace, args.workspace_bytes, workspace_bytes);
}

lb2_status check_prepacked(const lb2_prepacked_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_args(args, "lb2_prepacked_args"));
  return check_mode(*args);
}

lb2_status check_prepacked_buffers(const lb2_prepacked_args& args, int64_t k, int64_t n,
                                   int64_t workspace_bytes) noexcept {
  if (args.m == 0) return LB2_OK;
  const int64_t bytes = element_bytes(args.dtype);
  LB2_RETURN_IF_ERROR(check_rows("input", args.input, args.m, k, args.input_stride, 0, bytes));
  LB2_RETURN_IF_ERROR(check_rows("output", args.output, args.m, n, args.output_stride, n, bytes));
  return check_workspace(args.workspace, args.workspace_bytes, workspace_bytes);
}

lb2_status check_grouped(const lb2_grouped_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_fused(args, "lb2_grouped_args", 1, LB2_MAX_LAYERS));
  if (args->residual != nullptr && args->num_layers != 1)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "residual must be NULL unless num_layers is 1, got num_layers %" PRId64, args->num_layers);
  return LB2_OK;
}

lb2_status check_grouped_buffers(const lb2_grouped_args& args, int64_t k, const int64_t* n,
                                 int64_t workspace_bytes) noexcept {
  if (args.m == 0) return LB2_OK;
  const int64_t bytes = element_bytes(args.dtype);
  LB2_RETURN_IF_ERROR(check_norm(args.norm));
  LB2_RETURN_IF_ERROR(check_rows("input", args.input, args.m, k, args.input_stride, 0, bytes));
  if (args.outputs == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "outputs must not be NULL");
  for (int64_t i = 0; i < args.num_layers; ++i) {
    char name[32];
    std::snprintf(name, sizeof name, "outputs[%d]", static_cast<int>(i));
    const lb2_rows& output = args.outputs[i];
    LB2_RETURN_IF_ERROR(check_rows(name, output.data, args.m, n[i], output.stride, n[i], bytes));
  }
  if (args.residual != nullptr)
    LB2_RETURN_IF_ERROR(check_rows("residual", args.residual, args.m, n[0], args.residual_stride, 0, bytes));
  return check_workspace(args.workspace, args.workspace_bytes, workspace_bytes);
}

lb2_status check_mlp(const lb2_mlp_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_fused(args, "lb2_mlp_args", 2, 3));
  if (args->function >= LB2_FUNCTION_SILU && args->function <= LB2_FUNCTION_RELU) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT,
              "function must be LB2_FUNCTION_SILU (0), _GELU (1), _GELU_TANH (2) or _RELU (3), got %" PRId32,
              args->function);
}

lb2_status check_mlp_buffers(const lb2_mlp_args& args, int64_t k, int64_t n,
                             int64_t workspace_bytes) noexcept {
  if (args.m == 0) return LB2_OK;
  const int64_t bytes = element_bytes(args.dtype);
  LB2_RETURN_IF_ERROR(check_norm(args.norm));
  LB2_RETURN_IF_ERROR(check_rows("input", args.input, args.m, k, args.input_stride, 0, bytes));
  LB2_RETURN_IF_ERROR(check_rows("output", args.output, args.m, n, args.output_stride, n, bytes));
  if (args.residual != nullptr)
    LB2_RETURN_IF_ERROR(check_rows("residual", args.residual, args.m, n, args.residual_stride, 0, bytes));
  return check_workspace(args.workspace, args.workspace_bytes, workspace_bytes);
}

lb2_status check_int8(const lb2_int8_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_args(args, "lb2_int8_args"));
  LB2_RETURN_IF_ERROR(check_dtype(args->dtype));
  LB2_RETURN_IF_ERROR(check_tokens(args->m));
  LB2_RETURN_IF_ERROR(check_columns(args->k));
  if (args->n < 1 || args->n > kMaxDim) return invalid_size("n", args->n, 1);
  if (args->scale == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "scale must not be NULL");
  return check_rows("weight", args->weight, args->n, args->k, args->weight_stride, args->k, 1);
}

lb2_status check_int8_buffers(const lb2_int8_args& args, int64_t workspace_bytes) noexcept {
  if (args.m == 0) return LB2_OK;
  const int64_t bytes = element_bytes(args.dtype);
  LB2_RETURN_IF_ERROR(check_rows("input", args.input, args.m, args.k, args.input_stride, 0, bytes));
  LB2_RETURN_IF_ERROR(check_rows("output", args.output, args.m, args.n, args.output_stride, args.n, bytes));
  return check_workspace(args.workspace, args.workspace_bytes, workspace_bytes);
}

}  // namespace lb2

extern "C" lb2_status lb2_linear_shape(const lb2_linear_args* args, lb2_layer_shape* shape) {
  lb2_layer_shape found;
  LB2_RETURN_IF_ERROR(lb2::check_layer(args, &found));
  LB2_RETURN_IF_ERROR(lb2::check_shape_struct(shape));
  *shape = found;
  return LB2_OK;
}
