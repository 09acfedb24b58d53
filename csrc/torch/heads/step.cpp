#include "torch/heads/step.h"

#include "torch/heads/operands.h"

namespace lb2::torch_ops {
namespace {

// Rows of the cache, which are written where they lie.
void check_cache(const char* name, const Tensor& cache, const Tensor& like) {
  check_heads(name, cache, like);
  LB2_CHECK(has_contiguous_rows(cache), name, " must have contiguous rows, got a stride of ",
            cache.stride(cache.dim() - 1), " between the elements of a row");
}

// The place of the first new row; by default the new rows are the last ones.
int64_t place_of(const std::optional<Tensor>& position, int64_t last) {
  if (!position) return last;
  LB2_CHECK(position->is_cpu() && position->scalar_type() == ScalarType::Long && position->numel() == 1,
            "position must be one int64 on the CPU, got ",
            torch::headeronly::toString(position->scalar_type()), " ", shape_of(*position));
  return *static_cast<const int64_t*>(position->const_data_ptr());
}

}  // namespace

Tensor attention_step_cpu(const Tensor& query, const Tensor& new_key, const Tensor& new_value,
                          const Tensor& cos, const Tensor& sin, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& position, const std::optional<Tensor>& mask,
                          double scale, double softcap, bool causal, int64_t window, bool interleaved) {
  lb2_attention_step_args args = {};
  args.struct_size = sizeof args;
  args.dtype = element_type("query", query);
  LB2_CHECK(args.dtype != LB2_INT8, "query must be float32, float16 or bfloat16, got Bool");
  const Tensor q = with_rows("query", query, query), new_k = with_rows("new_key", new_key, query),
               new_v = with_rows("new_value", new_value, query);
  check_cache("key", key, query);
  check_cache("value", value, query);
  const int64_t b = q.size(0), m = q.size(2), d = q.size(3), g = new_k.size(1);
  LB2_CHECK(new_k.size(0) == b && new_k.size(2) == m && new_k.size(3) == d, "new_key must have shape [", b,
            ", kv_heads, ", m, ", ", d, "], got ", shape_of(new_k));
  LB2_CHECK(new_v.size(0) == b && new_v.size(1) == g && new_v.size(2) == m, "new_value must have shape [", b,
            ", ", g, ", ", m, ", value_size], got ", shape_of(new_v));
  LB2_CHECK(key.size(0) == b && key.size(1) == g && key.size(3) == d, "key must have shape [", b, ", ", g,
            ", keys, ", d, "], got ", shape_of(key));
  LB2_CHECK(value.size(0) == b && value.size(1) == g && value.size(2) == key.size(2) &&
                value.size(3) == new_v.size(3),
            "value must have shape [", b, ", ", g, ", ", key.size(2), ", ", new_v.size(3), "], got ",
            shape_of(value));
  args.batch = b;
  args.heads = q.size(1);
  args.kv_heads = g;
  args.queries = m;
  args.keys = key.size(2);
  args.head_size = d;
  args.value_size = value.size(3);
  args.position = place_of(position, args.keys - m);
  args.query = q.const_data_ptr();
  args.new_key = new_k.const_data_ptr();
  args.new_value = new_v.const_data_ptr();
  args.key = key.mutable_data_ptr();
  args.value = value.mutable_data_ptr();
  set_strides(q, args.query_strides);
  set_strides(new_k, args.new_key_strides);
  set_strides(new_v, args.new_value_strides);
  set_strides(key, args.key_strides);
  set_strides(value, args.value_strides);
  // These keep copies alive.
  const auto angles = set_angles(args, m, cos, sin);
  const Tensor kept = mask ? set_mask(args, *mask) : query;
  args.interleaved = interleaved ? 1 : 0;
  return attend(args, query, scale, softcap, causal, window, lb2_attention_step_workspace_cpu,
                lb2_attention_step_forward_cpu);
}

}  // namespace lb2::torch_ops
