#include "torch/heads/tensors.h"

namespace lb2::torch_ops {

lb2_dtype element_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return LB2_FLOAT32;
    case ScalarType::Half:
      return LB2_FLOAT16;
    case ScalarType::BFloat16:
      return LB2_BFLOAT16;
    case ScalarType::Bool:
      return LB2_INT8;
    default:
      raise(name, " must be float32, float16 or bfloat16, or bool if it is a mask, got ",
            torch::headeronly::toString(tensor.scalar_type()));
  }
}

bool has_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  return has_contiguous_rows(tensor) ? tensor : torch::stable::contiguous(tensor);
}

void check_heads(const char* name, const Tensor& tensor, const Tensor& like) {
  LB2_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  LB2_CHECK(tensor.dim() == 4, name, " must have four dimensions, got shape ", shape_of(tensor));
  LB2_CHECK(tensor.scalar_type() == like.scalar_type(), name, " must be ",
            torch::headeronly::toString(like.scalar_type()), " like query, got ",
            torch::headeronly::toString(tensor.scalar_type()));
}

Tensor with_rows(const char* name, const Tensor& tensor, const Tensor& like) {
  check_heads(name, tensor, like);
  return with_contiguous_rows(tensor);
}

}  // namespace lb2::torch_ops
