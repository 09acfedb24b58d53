// Masks and angles as arguments of the C ABI, for the operators that take such. Args: the struct of a call.
#pragma once

#include <utility>

#include "torch/heads/tensors.h"
#include "torch/workspace.h"

namespace lb2::torch_ops {

// Sets the mask [B, H, M, T] or 1 in one of the first three dimensions, which strides of 0 broadcast. Returns
// what has to stay: the mask with contiguous rows.
template <typename Args>
Tensor set_mask(Args& args, const Tensor& given) {
  LB2_CHECK(given.is_cpu(), "mask must be on the CPU like query");
  const int64_t sizes[4] = {args.batch, args.heads, args.queries, args.keys};
  bool fits = given.dim() == 4 && given.size(3) == sizes[3];
  for (int64_t d = 0; fits && d < 3; ++d) fits = given.size(d) == 1 || given.size(d) == sizes[d];
  LB2_CHECK(fits, "mask must have shape [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3],
            "] or 1 in one of the first three dimensions, got ", shape_of(given));
  args.mask_dtype = element_type("mask", given);
  const Tensor mask = with_contiguous_rows(given);
  set_strides(mask, args.mask_strides);
  args.mask = mask.const_data_ptr();
  return mask;
}

// Sets cos and sin [B or 1, tokens, R]. Returns what has to stay: both with contiguous rows.
template <typename Args>
std::pair<Tensor, Tensor> set_angles(Args& args, int64_t tokens, const Tensor& cos, const Tensor& sin) {
  const auto rows = [&](const char* name, const Tensor& angles) {
    LB2_CHECK(angles.is_cpu(), name, " must be on the CPU");
    LB2_CHECK(angles.dim() == 3 && (angles.size(0) == 1 || angles.size(0) == args.batch) &&
                  angles.size(1) == tokens,
              name, " must have shape [1 or ", args.batch, ", ", tokens, ", rotary size], got ",
              shape_of(angles));
    return with_contiguous_rows(angles);
  };
  const Tensor c = rows("cos", cos), s = rows("sin", sin);
  args.rotary_size = c.size(2);
  LB2_CHECK(s.size(2) == c.size(2), "sin must have ", c.size(2), " elements in a row like cos, got ",
            shape_of(s));
  args.angle_dtype = element_type("cos", c);
  LB2_CHECK(element_type("sin", s) == args.angle_dtype, "sin must be ",
            torch::headeronly::toString(c.scalar_type()), " like cos, got ",
            torch::headeronly::toString(s.scalar_type()));
  args.cos = c.const_data_ptr();
  args.sin = s.const_data_ptr();
  set_strides(c, args.cos_strides);
  set_strides(s, args.sin_strides);
  return {c, s};
}

// Computes attention of what args hold, by functions of the C ABI; the output [B, M, H, E] is new.
template <typename Args>
Tensor attend(Args& args, const Tensor& query, double scale, double softcap, bool causal, int64_t window,
              lb2_status (*workspace_bytes)(const Args*, int64_t*), lb2_status (*forward)(const Args*)) {
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.causal = causal ? 1 : 0;
  args.window = window;
  Tensor output = new_attention_output(query, args);
  args.num_threads = static_cast<int32_t>(torch::stable::get_num_threads());
  args.parallel_for = torch_parallel;
  throw_on_error(workspace_bytes(&args, &args.workspace_bytes));
  const Workspace workspace(args.workspace_bytes);
  args.workspace = workspace.data();
  throw_on_error(forward(&args));
  return output;
}

}  // namespace lb2::torch_ops
