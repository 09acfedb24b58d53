#include "torch/heads/attention.h"

#include "torch/heads/operands.h"

namespace lb2::torch_ops {
Tensor attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                     const std::optional<Tensor>& mask, double scale, double softcap, bool causal,
                     int64_t window) {
  lb2_attention_args args = {};
  args.struct_size = sizeof args;
  args.dtype = element_type("query", query);
  LB2_CHECK(args.dtype != LB2_INT8, "query must be float32, float16 or bfloat16, got Bool");
  const Tensor q = with_rows("query", query, query), k = with_rows("key", key, query),
               v = with_rows("value", value, query);
  LB2_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3), "key must have shape [", q.size(0),
            ", kv_heads, keys, ", q.size(3), "], got ", shape_of(k));
  LB2_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
            "value must have shape [", k.size(0), ", ", k.size(1), ", ", k.size(2), ", value_size], got ",
            shape_of(v));
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.queries = q.size(2);
  args.head_size = q.size(3);
  args.kv_heads = k.size(1);
  args.keys = k.size(2);
  args.value_size = v.size(3);
  args.query = q.const_data_ptr();
  args.key = k.const_data_ptr();
  args.value = v.const_data_ptr();
  set_strides(q, args.query_strides);
  set_strides(k, args.key_strides);
  set_strides(v, args.value_strides);
  const Tensor kept = mask ? set_mask(args, *mask) : query;  // keeps a copy of the mask alive
  args.offset = causal ? args.keys - args.queries : 0;
  return attend(args, query, scale, softcap, causal, window, lb2_attention_workspace_cpu,
                lb2_attention_forward_cpu);
}

}  // namespace lb2::torch_ops
