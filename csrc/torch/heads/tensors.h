// Tensors of heads [B, H, M, D] as arguments of the C ABI, for the operators that take such.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

// The lb2_dtype of a tensor; LB2_INT8 for bool.
lb2_dtype element_type(const char* name, const Tensor& tensor);

// A tensor of four dimensions of the dtype of `like`, whose last one is contiguous: `tensor`, or a dense
// copy.
Tensor with_rows(const char* name, const Tensor& tensor, const Tensor& like);

// `tensor`, or a dense copy if its last dimension is not contiguous.
Tensor with_contiguous_rows(const Tensor& tensor);

// The strides of all dimensions but the last; 0 for those of size 1.
template <size_t kCount>
void set_strides(const Tensor& tensor, int64_t (&strides)[kCount]) {
  for (size_t d = 0; d < kCount; ++d) {
    const int64_t dim = static_cast<int64_t>(d);
    strides[d] = tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
  }
}

}  // namespace lb2::torch_ops
