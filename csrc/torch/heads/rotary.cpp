#include "torch/heads/rotary.h"

#include "torch/heads/tensors.h"

namespace lb2::torch_ops {
namespace {

// cos or sin [B or 1, M, R] with contiguous rows.
Tensor angles_of(const char* name, const Tensor& angles, const lb2_rotary_args& args) {
  LB2_CHECK(angles.is_cpu(), name, " must be on the CPU");
  LB2_CHECK(angles.dim() == 3 && (angles.size(0) == 1 || angles.size(0) == args.batch) &&
                angles.size(1) == args.tokens,
            name, " must have shape [1 or ", args.batch, ", ", args.tokens, ", rotary size], got ",
            shape_of(angles));
  return with_contiguous_rows(angles);
}

}  // namespace

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
  const Tensor c = angles_of("cos", cos, args), s = angles_of("sin", sin, args);
  args.rotary_size = c.size(2);
  LB2_CHECK(s.size(2) == c.size(2), "sin must have ", c.size(2), " elements in a row like cos, got ",
            shape_of(s));
  args.angle_dtype = element_type("cos", c);
  LB2_CHECK(element_type("sin", s) == args.angle_dtype, "sin must be ",
            torch::headeronly::toString(c.scalar_type()), " like cos, got ",
            torch::headeronly::toString(s.scalar_type()));
  args.query = q.const_data_ptr();
  args.key = k.const_data_ptr();
  args.cos = c.const_data_ptr();
  args.sin = s.const_data_ptr();
  set_strides(q, args.query_strides);
  set_strides(k, args.key_strides);
  set_strides(c, args.cos_strides);
  set_strides(s, args.sin_strides);
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
