// The decode kernel: signs [rows, cols] times the activations of up to 16 tokens.
//
// A block owns 16 * row_warps rows, one part of the columns and one tile of tokens. Its warps stage the
// activations chunk by chunk (staging.h), then multiply: warp (row, split) takes 16 rows and every
// split_warps-th slice, with the words of its next two slices in flight. At the end, the partial sums of a
// row's warps meet in shared memory and are added in order. Which slices a warp adds, and in which order,
// depends on the layer alone: results do not depend on the number of tokens, and no atomics are used.
#pragma once

#include "cuda/bit_planes.h"
#include "cuda/sign_halves.h"

namespace lb2::cuda {

// Where things lie in a block's shared memory.
template <typename Mma, int kTokens>
struct SharedLayout {
  static constexpr int kTiles = Mma::template kTiles<kTokens>;
  static constexpr int kScales = kTiles * Mma::kTokensPerTile;
  static constexpr int kSliceBytes = slice_bytes(Mma::kActivation, kTokens);
  static_assert(kScales >= kTokens && kSliceBytes == kTiles * Mma::kTileBytes + (kScales * 8 + 15) / 16 * 16,
                "planning and kernel disagree about shared memory");
};

struct WarpWork {
  const uint32_t* words[2];  // of rows g and g + 8 of the tile
  int32_t row_words;
  bool aligned;
};

LB2_DEVICE WarpWork warp_work(const Term& term, int first_row, int lane) {
  WarpWork work;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Rows past the last one repeat it; their sums are not stored.
    const int row = first_row + lane / 4 + 8 * half;
    work.words[half] = term.words + (row < term.rows ? row : term.rows - 1) * term.word_stride;
  }
  work.row_words = (term.cols + LB2_WORD_BITS - 1) / LB2_WORD_BITS;
  work.aligned = (reinterpret_cast<uintptr_t>(term.words) & 15) == 0 && (term.word_stride & 3) == 0;
  return work;
}

struct SliceSigns {
  Words4 low, high;
};

LB2_DEVICE Words4 load_signs(const uint32_t* row, int word, const WarpWork& work) {
  if (work.aligned && word + 4 <= work.row_words) return load_stream(row + word);
  Words4 words;
#pragma unroll
  for (int i = 0; i < 4; ++i) words.w[i] = word + i < work.row_words ? load_stream_word(row + word + i) : 0u;
  return words;
}

LB2_DEVICE SliceSigns load_slice(const WarpWork& work, int slice, int end, int lane) {
  const int word = slice < end ? slice * kSliceWords + (lane % 4) * 4 : work.row_words;
  return {load_signs(work.words[0], word, work), load_signs(work.words[1], word, work)};
}

// Stages slices [begin, end) of the block's tokens.
template <typename Mma, int kTokens>
LB2_DEVICE void stage_chunk(const StageParams& params, const Term& term, int begin, int end, int first_token,
                            int tokens, unsigned char* shared) {
  using Layout = SharedLayout<Mma, kTokens>;
  const int warp = thread_id() / kWarpLanes, lane = thread_id() % kWarpLanes;
  const int64_t stride = params.input_stride != 0 ? params.input_stride : term.cols;
  const int element_bytes = params.input_dtype == LB2_FLOAT32 ? 4 : 2;
  // Tokens past the last one keep whatever is in their columns: columns of an MMA do not mix.
  for (int item = warp; item < (end - begin) * tokens; item += kWarps) {
    const int slice = begin + item / tokens, token = item % tokens;
    const SliceSource source = {
        static_cast<const char*>(term.input) + (first_token + token) * stride * element_bytes,
        term.scale,
        term.part_stride * element_bytes,
        params.num_parts,
        term.cols,
        params.input_dtype};
    const int first = slice * kSliceCols, left = term.cols - first;
    float values[kLaneCols];
    load_run(source, first + Mma::first_run(lane), values);
    load_run(source, first + Mma::second_run(lane), values + kRunCols);
    unsigned char* slice_data = shared + (slice - begin) * Layout::kSliceBytes;
    float* scales = reinterpret_cast<float*>(slice_data + Layout::kTiles * Mma::kTileBytes);
    Mma::stage(values, lane, left < kSliceCols ? left : kSliceCols, token, slice_data, scales + token,
               reinterpret_cast<int32_t*>(scales + Layout::kScales) + token);
  }
}

LB2_DEVICE void store_element(void* output, int64_t index, lb2_dtype dtype, float value) {
  if (dtype == LB2_FLOAT32)
    static_cast<float*>(output)[index] = value;
  else
    static_cast<uint16_t*>(output)[index] =
        dtype == LB2_FLOAT16 ? float_to_half(value) : float_to_bfloat(value);
}

template <typename Mma, int kTokens>
LB2_DEVICE void decode_block(const StageParams& params) {
  using Layout = SharedLayout<Mma, kTokens>;
  constexpr int kSlots = Mma::template kSlots<kTokens>;
  const int warp = thread_id() / kWarpLanes, lane = thread_id() % kWarpLanes;
  const int row_warp = warp % params.row_warps, split_warp = warp / params.row_warps;
  const int split_warps = kWarps / params.row_warps;
  const int first_token = block_z() * kTokens;
  const int tokens = params.m - first_token < kTokens ? params.m - first_token : kTokens;
  unsigned char* shared = shared_memory();

  int first_term = 0, last_term = params.num_terms;
  if (params.alone) {
    while (first_term + 1 < params.num_terms && params.terms[first_term + 1].first_tile <= block_x())
      ++first_term;
    last_term = first_term + 1;
  }
  const int rows = params.terms[first_term].rows;
  const int tile_row =
      (block_x() - (params.alone ? params.terms[first_term].first_tile : 0)) * params.row_warps * kTileRows;
  const int first_row = tile_row + row_warp * kTileRows;

  float sums[kSlots][2] = {};
  for (int index = first_term; index < last_term; ++index) {
    const Term& term = params.terms[index];
    const int slices = (term.cols + kSliceCols - 1) / kSliceCols;
    const int begin = static_cast<int>(static_cast<int64_t>(slices) * block_y() / params.splits);
    const int end = static_cast<int>(static_cast<int64_t>(slices) * (block_y() + 1) / params.splits);
    const WarpWork work = warp_work(term, first_row, lane);
    int slice = begin + split_warp;
    SliceSigns current = load_slice(work, slice, end, lane);
    SliceSigns next = load_slice(work, slice + split_warps, end, lane);
    // Only signs were read so far; the activations are what the kernel before this one writes.
    if (index == first_term) {
      wait_for_previous_kernel();
      let_next_kernel_start();
    }
    float term_sums[kSlots][2] = {};
    for (int chunk = begin; chunk < end; chunk += params.chunk_slices) {
      const int chunk_end = chunk + params.chunk_slices < end ? chunk + params.chunk_slices : end;
      sync_block();  // the chunk before this one has been used up
      stage_chunk<Mma, kTokens>(params, term, chunk, chunk_end, first_token, tokens, shared);
      sync_block();
      for (; slice < chunk_end; slice += split_warps) {
        const unsigned char* slice_data = shared + (slice - chunk) * Layout::kSliceBytes;
        const float* scales = reinterpret_cast<const float*>(slice_data + Layout::kTiles * Mma::kTileBytes);
        const SliceSigns signs = current;
        current = next;
        next = load_slice(work, slice + 2 * split_warps, end, lane);
        Mma::template add<kTokens>(signs.low, signs.high, slice_data, scales,
                                   reinterpret_cast<const int32_t*>(scales + Layout::kScales), lane,
                                   term_sums);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int at = first_row + lane / 4 + 8 * row;
      const float scale = term.row_scale != nullptr && at < rows ? term.row_scale[at] : 1.0f;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        sums[slot][row] = fused_multiply_add(term_sums[slot][row], scale, sums[slot][row]);
    }
  }

  // partial[split_warp][token][row of the block]
  const int block_rows = params.row_warps * kTileRows;
  float* partial = reinterpret_cast<float*>(shared + params.chunk_slices * Layout::kSliceBytes);
  Mma::template finish<kTokens>(sums, lane, [&](int token, int half, float sum) {
    partial[(split_warp * kTokens + token) * block_rows + row_warp * kTileRows + lane / 4 + 8 * half] = sum;
  });
  sync_block();
  const Term& term = params.terms[first_term];
  for (int item = thread_id(); item < tokens * block_rows; item += kThreads) {
    const int token = item / block_rows, row = tile_row + item % block_rows;
    if (row >= rows) continue;
    float sum = 0.0f;
    for (int split = 0; split < split_warps; ++split) sum += partial[split * kTokens * block_rows + item];
    const int64_t at = first_token + token;
    if (params.alone) {
      term.sums[(static_cast<int64_t>(block_y()) * params.m + at) * rows + row] = sum;
    } else {
      if (params.bias != nullptr) sum += params.bias[row];
      store_element(params.output, at * params.output_stride + row, params.output_dtype, sum);
    }
  }
}

// Two blocks on an SM where the sums of few tokens leave registers for it.
template <typename Mma, int kTokens>
LB2_KERNEL(kThreads, kTokens <= 4 ? 2 : 1)
decode(const LB2_GRID_CONSTANT StageParams params) {
  decode_block<Mma, kTokens>(params);
}

}  // namespace lb2::cuda
