// Kernels for what surrounds the layers of calls with many tokens, whose products have no room for it: for
// those, a pass over the activations costs little beside the products.
#pragma once

#include "cuda/extras.h"

namespace lb2::cuda {

struct NormalizeParams {
  const void* input;  // [m, cols]
  int64_t input_stride;
  lb2_dtype dtype;
  int32_t cols;
  lb2_norm norm;
  float* output;  // [m, cols]
};

// output = input / sqrt(mean of squares + eps) * (weight + offset); a block has one token.
LB2_KERNEL(kThreads) normalize(const LB2_GRID_CONSTANT NormalizeParams params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int warp = thread_id() / kWarpLanes, lane = thread_id() % kWarpLanes;
  float* squares = reinterpret_cast<float*>(shared_memory());
  const int64_t token = block_x();
  const SliceSource row = plain_row(params.input, token * params.input_stride, params.cols, params.dtype);
  const float part = part_of_squares(row, warp, lane);
  if (lane == 0) squares[warp] = part;
  sync_block();
  float sum = 0.0f;
  for (int i = 0; i < kWarps; ++i) sum += squares[i];
  const float norm = norm_of(sum, params.cols, params.norm.eps);
  for (int col = thread_id(); col < params.cols; col += kThreads)
    params.output[token * params.cols + col] =
        load_element(row.row, col, params.dtype) * norm *
        (load_element(params.norm.weight, col, params.norm.dtype) + params.norm.offset);
}

// Columns of a block of the kernel below.
constexpr int kPointwiseCols = 4 * kThreads;

struct PointwiseParams {
  void* data;          // [m, cols]
  const void* factor;  // [m, cols] or NULL
  const void* addend;  // [m, cols] or NULL
  int64_t stride, factor_stride, addend_stride;
  lb2_dtype dtype;
  lb2_function function;  // or kNoFunction
  int32_t cols, row_blocks;
};

// data = function(data) * factor + addend; blocks are [tokens times row_blocks].
LB2_KERNEL(kThreads) pointwise(const LB2_GRID_CONSTANT PointwiseParams params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t token = block_x() / params.row_blocks;
  const int first = block_x() % params.row_blocks * kPointwiseCols + thread_id();
#pragma unroll
  for (int i = 0; i < kPointwiseCols / kThreads; ++i) {
    const int col = first + i * kThreads;
    if (col >= params.cols) return;
    float value =
        apply_function(params.function, load_element(params.data, token * params.stride + col, params.dtype));
    if (params.factor != nullptr)
      value *= load_element(params.factor, token * params.factor_stride + col, params.dtype);
    if (params.addend != nullptr)
      value += load_element(params.addend, token * params.addend_stride + col, params.dtype);
    store_element(params.data, token * params.stride + col, params.dtype, value);
  }
}

}  // namespace lb2::cuda
