#include "torch/heads/rotary.h"

#include "torch/heads/operands.h"

namespace lb2::torch_ops {
std::tuple<Tensor, Tensor> rotary_cpu(const Tensor& query, const Tensor& key, const Tensor& cos,
                                      const Tensor& sin, bool interleaved) {
  lb2_rotary_args args = {};
  args.struct_size = sizeof args;
  args.dtype = element_type("query", query);
  const Tensor q = with_rows("query", query, query), k = with_rows("key", key, query);
  LB2_CHECK(k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3),
            "key must have shape [", q.size(0), ", kv_heads, ", q.size(2), ", ", q.size(3), "], got ",
            shape_of(k));
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.kv_heads = k.size(1);
  args.tokens = q.size(2);
  args.head_size = q.size(3);
  const auto angles = set_angles(args, args.tokens, cos, sin);  // keeps copies alive
  args.query = q.const_data_ptr();
  args.key = k.const_data_ptr();
  set_strides(q, args.query_strides);
  set_strides(k, args.key_strides);
  const std::array<int64_t, 4> query_shape = {args.batch, args.tokens, args.heads, args.head_size};
  const std::array<int64_t, 4> key_shape = {args.batch, args.tokens, args.kv_heads, args.head_size};
  Tensor query_out = torch::stable::new_empty(query, query_shape),
         key_out = torch::stable::new_empty(query, key_shape);
  args.query_out = query_out.mutable_data_ptr();
  args.key_out = key_out.mutable_data_ptr();
  args.interleaved = interleaved ? 1 : 0;
  args.parallel_for = torch_parallel;
  throw_on_error(lb2_rotary_forward_cpu(&args));
  return {query_out, key_out};
}

}  // namespace lb2::torch_ops
