#include "torch/dense/factors.h"

namespace lb2::torch_ops {
namespace {

ScalarType scalar_type(int64_t dtype) {
  switch (dtype) {
    case LB2_FLOAT32:
      return ScalarType::Float;
    case LB2_FLOAT16:
      return ScalarType::Half;
    case LB2_BFLOAT16:
      return ScalarType::BFloat16;
    default:
      raise("dtype must be ", LB2_FLOAT32, " (float32), ", LB2_FLOAT16, " (float16) or ", LB2_BFLOAT16,
            " (bfloat16), got ", dtype);
  }
}

}  // namespace

std::vector<Tensor> new_factors(lb2_linear_args& args, const Tensor& like, int64_t dtype) {
  const ScalarType type = scalar_type(dtype);
  args.dtype = static_cast<lb2_dtype>(dtype);
  const auto matrix = [&](int64_t rows, int64_t cols) {
    const std::array<int64_t, 2> shape = {rows, cols};
    return torch::stable::new_empty(like, shape, type);
  };
  if (args.paths[0].u == nullptr) return {matrix(args.n, args.k)};
  int64_t latents = 0;
  for (int64_t p = 0; p < args.num_paths; ++p) latents += args.paths[p].rank;
  return {matrix(latents, args.k), matrix(args.n, latents)};
}

}  // namespace lb2::torch_ops
