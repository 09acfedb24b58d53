// Dense int8 rows for few tokens: y = scale * (x @ weight^T) + bias. The weights are read once, 16 bytes at a
// time, and everything else is arranged so that this is what takes the time.
#pragma once

#include "cuda/extras.h"

namespace lb2::cuda {

constexpr int kInt8WarpRows = 4;                       // rows of a warp: each value of x serves all of them
constexpr int kInt8Rows = kWarps * kInt8WarpRows;      // rows of a block
constexpr int kInt8LaneCols = 16;                      // columns of a lane in a step: 16 bytes
constexpr int kInt8Step = kWarpLanes * kInt8LaneCols;  // columns of a warp in a step
constexpr int kInt8ChunkBytes = 64 * 1024;             // of x in shared memory, in fp32

struct Int8Params {
  const int8_t* weight;
  const float* scale;
  const float* bias;  // or NULL
  const void* input;
  void* output;
  int64_t weight_stride, input_stride, output_stride;
  int32_t m, k, n;
  lb2_dtype dtype;
  int32_t chunk_steps;  // steps whose activations are in shared memory at the same time
};

// Byte `byte` of four int8 with their sign bits flipped, as a float.
LB2_DEVICE float int8_value(uint32_t flipped, int byte) {
  return bits_float(0x4B000000u | (flipped >> (8 * byte) & 0xFFu)) - 8388736.0f;  // 2^23 + 128
}

// 16 weights from column `col` on, zero past the end.
LB2_DEVICE Words4 load_weights(const int8_t* row, int col, int k, bool aligned) {
  if (aligned && col + kInt8LaneCols <= k) return load_stream(reinterpret_cast<const uint32_t*>(row + col));
  Words4 weights = {};
  if (col >= k) return weights;
#pragma unroll
  for (int i = 0; i < kInt8LaneCols; ++i)
    if (col + i < k)
      weights.w[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(row[col + i])) << (i % 4 * 8);
  return weights;
}

// Brings the activations of the steps [begin, end) into shared memory, [step][token][4][lane][4]: four
// columns of a lane are 16 bytes, those of its neighbor lie beside them.
template <int kTokens>
LB2_DEVICE void stage_activations(const Int8Params& params, int begin, int end, int first_token,
                                  float* shared) {
  for (int at = thread_id(); at < (end - begin) * kTokens * kInt8Step; at += kThreads) {
    const int col = at % kInt8Step, token = at / kInt8Step % kTokens, step = at / kInt8Step / kTokens;
    const int from = (begin + step) * kInt8Step + col;
    const bool inside = from < params.k && first_token + token < params.m;
    const int lane = col / kInt8LaneCols, quarter = col % kInt8LaneCols / 4;
    shared[(step * kTokens + token) * kInt8Step + (quarter * kWarpLanes + lane) * 4 + col % 4] =
        inside ? load_element(params.input, (first_token + token) * params.input_stride + from, params.dtype)
               : 0.0f;
  }
}

// A block has kInt8Rows rows and kTokens tokens. A lane adds its columns in order, then the lanes of a warp
// add theirs: a result depends on its row and token alone.
template <int kTokens>
LB2_KERNEL(kThreads, kTokens < 16 ? 2 : 1)
int8_rows(const LB2_GRID_CONSTANT Int8Params params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int warp = thread_id() / kWarpLanes, lane = thread_id() % kWarpLanes;
  const int first_row = block_x() * kInt8Rows + warp * kInt8WarpRows, first_token = block_y() * kTokens;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int8_t* rows[kInt8WarpRows];
  bool aligned = (params.weight_stride & 15) == 0 && aligned16(params.weight);
#pragma unroll
  for (int r = 0; r < kInt8WarpRows; ++r) {
    // Rows past the last one repeat it; their sums are not stored.
    const int row = first_row + r < params.n ? first_row + r : params.n - 1;
    rows[r] = params.weight + row * params.weight_stride;
  }
  aligned = aligned || (params.n == 1 && aligned16(params.weight));
  const int steps = (params.k + kInt8Step - 1) / kInt8Step;
  Words4 next[kInt8WarpRows];
#pragma unroll
  for (int r = 0; r < kInt8WarpRows; ++r)
    next[r] = load_weights(rows[r], lane * kInt8LaneCols, params.k, aligned);
  float sums[kInt8WarpRows][kTokens] = {};
  for (int chunk = 0; chunk < steps; chunk += params.chunk_steps) {
    const int end = chunk + params.chunk_steps < steps ? chunk + params.chunk_steps : steps;
    if (chunk > 0) sync_block();  // the chunk before this one has been used up
    stage_activations<kTokens>(params, chunk, end, first_token, shared);
    sync_block();
#pragma unroll 1
    for (int step = chunk; step < end; ++step) {
      Words4 current[kInt8WarpRows];
#pragma unroll
      for (int r = 0; r < kInt8WarpRows; ++r) {
        current[r] = next[r];
        next[r] = load_weights(rows[r], (step + 1) * kInt8Step + lane * kInt8LaneCols, params.k, aligned);
      }
      const float* x = shared + (step - chunk) * kTokens * kInt8Step + lane * 4;
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        float weights[kInt8WarpRows][4];
#pragma unroll
        for (int r = 0; r < kInt8WarpRows; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) weights[r][i] = int8_value(current[r].w[quarter] ^ 0x80808080u, i);
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          const Words4 values = load_words4(x + token * kInt8Step + quarter * kWarpLanes * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int r = 0; r < kInt8WarpRows; ++r)
              sums[r][token] = fused_multiply_add(weights[r][i], bits_float(values.w[i]), sums[r][token]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kInt8WarpRows; ++r)
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const float sum = warp_sum(sums[r][token]);
      const int row = first_row + r;
      if (lane != (r * kTokens + token) % kWarpLanes || row >= params.n || first_token + token >= params.m)
        continue;
      const float scaled = multiply_rounded(sum, params.scale[row]);
      store_element(params.output, (first_token + token) * params.output_stride + row, params.dtype,
                    params.bias != nullptr ? scaled + params.bias[row] : scaled);
    }
}

}  // namespace lb2::cuda
