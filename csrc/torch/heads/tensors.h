// Tensors of heads [B, H, M, D] as arguments of the C ABI, for the operators that take such.
#pragma once

#include "torch/arguments.h"

namespace lb2::torch_ops {

// The lb2_dtype of a tensor; LB2_INT8 for bool.
lb2_dtype element_type(const char* name, const Tensor& tensor);

// Raises unless a tensor has four dimensions and the dtype of `like`, on the CPU.
void check_heads(const char* name, const Tensor& tensor, const Tensor& like);

// Whether the last dimension is contiguous.
bool has_contiguous_rows(const Tensor& tensor);

// `tensor`, or a dense copy if its last dimension is not contiguous.
Tensor with_contiguous_rows(const Tensor& tensor);

// Both: a tensor of heads with contiguous rows.
Tensor with_rows(const char* name, const Tensor& tensor, const Tensor& like);

// The strides of all dimensions but the last; 0 for those of size 1.
template <size_t kCount>
void set_strides(const Tensor& tensor, int64_t (&strides)[kCount]) {
  for (size_t d = 0; d < kCount; ++d) {
    const int64_t dim = static_cast<int64_t>(d);
    strides[d] = tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
  }
}

// An uninitialized [B, M, H, E] for the call that `args` describes, as its output. Args: the struct of a
// call.
template <typename Args>
Tensor new_attention_output(const Tensor& query, Args& args) {
  const std::array<int64_t, 4> shape = {args.batch, args.queries, args.heads, args.value_size};
  Tensor output = torch::stable::new_empty(query, shape);
  args.output = output.mutable_data_ptr();
  args.output_strides[0] = args.queries * args.heads * args.value_size;
  args.output_strides[1] = args.value_size;
  args.output_strides[2] = args.heads * args.value_size;
  return output;
}

}  // namespace lb2::torch_ops
