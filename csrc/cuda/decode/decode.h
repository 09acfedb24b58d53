// The decode kernel: signs [rows, cols] times the activations of up to 16 tokens.
//
// A block owns 16 * row_warps rows of one group, one part of its columns and one tile of tokens. The slices
// of its columns, of all terms of the group one after another, are its items. It brings their activations
// into shared memory chunk by chunk (convert.h), then multiplies: warp (row, split) takes 16 rows and every
// split_warps-th item, with the words of its next two items in flight. At the end, the partial sums of a
// row's warps meet in shared memory and are added in order. Which items a warp adds, and in which order,
// depends on the layer alone: results do not depend on the number of tokens, and no atomics are used.
#pragma once

#include "cuda/decode/convert.h"

namespace lb2::cuda {

// What a block adds up: a part of the slices of its group's terms.
struct Items {
  const DecodeParams* params;
  const Group* group;
  int begin;  // first slice, counted from the group's first term on
  int count;

  struct Place {
    int term, slice;
  };
  // For 0 <= item < count.
  LB2_DEVICE Place operator[](int item) const {
    int term = group->first_term, slice = begin + item;
    while (term + 1 < group->last_term && slice >= params->terms[term].slices) {
      slice -= params->terms[term].slices;
      ++term;
    }
    return {term, slice};
  }
};

LB2_DEVICE Items block_items(const DecodeParams& params) {
  int index = 0;
  while (index + 1 < params.num_groups && params.groups[index + 1].first_tile <= block_x()) ++index;
  const Group& group = params.groups[index];
  int64_t slices = 0;
  for (int term = group.first_term; term < group.last_term; ++term) slices += params.terms[term].slices;
  const int begin = static_cast<int>(slices * block_y() / params.splits);
  return {&params, &group, begin, static_cast<int>(slices * (block_y() + 1) / params.splits) - begin};
}

// What a lane needs of one item: the words of rows g and g + 8, and what their sums are multiplied by.
struct ItemSigns {
  Words4 low, high;
  float row_scale[2];
};

LB2_DEVICE Words4 load_signs(const uint32_t* row, int word, int row_words, bool wide) {
  if (wide && word < row_words) return load_stream(row + word);
  Words4 words;
#pragma unroll
  for (int i = 0; i < 4; ++i) words.w[i] = word + i < row_words ? load_stream_word(row + word + i) : 0u;
  return words;
}

LB2_DEVICE ItemSigns load_item(const Items& items, int item, int first_row, int lane) {
  ItemSigns signs = {};
  if (item >= items.count) return signs;
  const Items::Place place = items[item];
  const Term& term = items.params->terms[place.term];
  const int rows = items.group->rows;
  const int row_words = (term.cols + LB2_WORD_BITS - 1) / LB2_WORD_BITS;
  const int word = place.slice * kSliceWords + lane % 4 * 4;
  const bool aligned = aligned16(term.words) && (term.word_stride & 3) == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Rows past the last one repeat it; their sums are not stored.
    int row = first_row + lane / 4 + 8 * half;
    row = row < rows ? row : rows - 1;
    // What lies between two rows can be read as well: its columns are zero. Nothing lies past the last row.
    const int readable = row + 1 < rows ? static_cast<int>(term.word_stride) : row_words;
    (half == 0 ? signs.low : signs.high) =
        load_signs(term.words + row * term.word_stride, word, row_words, aligned && word + 4 <= readable);
    signs.row_scale[half] = term.row_scale != nullptr ? term.row_scale[row] : 1.0f;
  }
  return signs;
}

// The signs of the four items after the two in registers into the L2 cache, so that memory is busy while
// activations are staged: lane (g, t) asks for rows g and g + 8 of one of them.
LB2_DEVICE void prefetch_items(const Items& items, int item, int step, int first_row, int lane) {
  const int ahead = item + (2 + lane % 4) * step;
  if (ahead >= items.count) return;
  const Items::Place place = items[ahead];
  const Term& term = items.params->terms[place.term];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + 8 * half;
    if (row < items.group->rows) prefetch(term.words + row * term.word_stride + place.slice * kSliceWords);
  }
}

// Brings the activations of items [begin, end) into shared memory. Others see them after a barrier.
template <typename Mma, int kTokens, bool kExtended>
LB2_DEVICE void stage_items(const Items& items, int begin, int end, int first_token, int tokens,
                            unsigned char* shared) {
  constexpr int kBytes = SliceLayout<Mma, kTokens>::kBytes;
  if constexpr (SliceLayout<Mma, kTokens>::kConvertedAhead) {
    for (int item = begin; item < end; ++item) {
      const Items::Place place = items[item];
      const unsigned char* source =
          converted_slice<Mma, kTokens>(items.params->terms[place.term], block_z(), place.slice);
      unsigned char* target = shared + (item - begin) * kBytes;
      for (int at = thread_id() * 16; at < kBytes; at += kThreads * 16) copy_words4(target + at, source + at);
    }
    wait_for_copies();
  } else {
    for (int i = thread_id() / kWarpLanes; i < (end - begin) * kTokens; i += kWarps) {
      const int item = begin + i / kTokens, token = i % kTokens;
      if (token >= tokens) continue;
      const Items::Place place = items[item];
      convert_slice<Mma, kTokens, kExtended>(*items.params, items.params->terms[place.term], place.slice,
                                             first_token, token, shared + (item - begin) * kBytes);
    }
  }
}

// The scales that the first chunk will be multiplied by, into the L2 cache.
template <typename Mma, bool kExtended>
LB2_DEVICE void prefetch_scales(const Items& items) {
  const int warp = thread_id() / kWarpLanes, lane = thread_id() % kWarpLanes;
  if (warp >= items.count) return;
  const Items::Place place = items[warp];
  const Term& term = items.params->terms[place.term];
  const int col = place.slice * kSliceCols + Mma::first_run(lane);
  if (col >= term.cols) return;
  prefetch(term.scale + col);
  if constexpr (kExtended) {
    const Extras& extras = items.params->extras;
    const int element_bytes = extras.factor_dtype == LB2_FLOAT32 ? 4 : 2;
    // A factor of each token comes from the kernel before this one.
    if (extras.factor != nullptr && extras.factor_stride == 0)
      prefetch(static_cast<const char*>(extras.factor) + static_cast<int64_t>(col) * element_bytes);
  }
}

// The sums of squares of the block's tokens into shared memory after the sums of the warps,
// squares[token][warp].
LB2_DEVICE void sum_squares(const DecodeParams& params, int first_token, int tokens, float* squares) {
  const int warp = thread_id() / kWarpLanes, lane = thread_id() % kWarpLanes;
  const Term& term = params.terms[0];  // all of the launch have the same input
#pragma unroll 1
  for (int token = 0; token < tokens; ++token) {
    const int64_t first = (first_token + token) * term.input_stride;
    const float sum =
        part_of_squares(plain_row(term.input, first, term.cols, params.input_dtype), warp, lane);
    if (lane == 0) squares[token * kWarps + warp] = sum;
  }
}

// What the sums of a token of the block are multiplied by.
template <bool kConvertedAhead>
LB2_DEVICE float token_norm(const DecodeParams& params, const float* squares, int first_token, int token) {
  if constexpr (kConvertedAhead) return params.extras.norms[first_token + token];
  float sum = 0.0f;
#pragma unroll 1
  for (int warp = 0; warp < kWarps; ++warp) sum += squares[token * kWarps + warp];
  return norm_of(sum, params.terms[0].cols, params.extras.eps);
}

// Adds up the sums of the warps that share rows, partial[split_warp][token][row of the block], and stores
// them.
template <typename Mma, int kTokens, bool kExtended>
LB2_DEVICE void store_rows(const DecodeParams& params, const Group& group, const float* partial,
                           int first_token, int tokens, int tile_row) {
  const int block_rows = 1 << params.block_rows_log2, split_warps = kWarps / params.row_warps;
  const int64_t first_row = static_cast<int64_t>(block_y()) * params.m + first_token;
  for (int item = thread_id(); item < tokens << params.block_rows_log2; item += kThreads) {
    const int token = item >> params.block_rows_log2, row = tile_row + (item & (block_rows - 1));
    if (row >= group.rows) continue;
    float sum = group.bias != nullptr ? group.bias[row] : 0.0f;
    float parts = 0.0f;
    for (int split = 0; split < split_warps; ++split) parts += partial[split * kTokens * block_rows + item];
    if constexpr (kExtended) {
      const Extras& extras = params.extras;
      if (extras.normed)
        parts *= token_norm<SliceLayout<Mma, kTokens>::kConvertedAhead>(
            params, partial + kWarps * kTileRows * kTokens, first_token, token);
      sum += parts;
      if (row < extras.function_rows && &group == params.groups) sum = apply_function(extras.function, sum);
      if (extras.residual != nullptr)
        sum += load_element(extras.residual, (first_token + token) * extras.residual_stride + row,
                            params.output_dtype);
    } else {
      sum += parts;
    }
    store_element(group.output, (first_row + token) * group.output_stride + row, params.output_dtype, sum);
  }
}

template <typename Mma, int kTokens, bool kExtended>
LB2_DEVICE void decode_block(const DecodeParams& params) {
  using Layout = SliceLayout<Mma, kTokens>;
  constexpr int kSlots = Mma::template kSlots<kTokens>;
  const int warp = thread_id() / kWarpLanes, lane = thread_id() % kWarpLanes;
  const int row_warp = warp % params.row_warps, split_warp = warp / params.row_warps;
  const int split_warps = kWarps / params.row_warps;
  const int first_token = block_z() * kTokens;
  const int tokens = params.m - first_token < kTokens ? params.m - first_token : kTokens;
  unsigned char* shared = shared_memory();

  // The kernel before this one may have written anything, unless it is known to have left the layer alone.
  if (!params.signs_early) wait_for_previous_kernel();
  const Items items = block_items(params);
  const Group& group = *items.group;
  const int tile_row = (block_x() - group.first_tile) << params.block_rows_log2;
  const int first_row = tile_row + row_warp * kTileRows;
  int item = split_warp;
  ItemSigns current = load_item(items, item, first_row, lane);
  ItemSigns next = load_item(items, item + split_warps, first_row, lane);
  prefetch_items(items, item, split_warps, first_row, lane);
  if constexpr (!Layout::kConvertedAhead) prefetch_scales<Mma, kExtended>(items);
  if (group.bias != nullptr && tile_row + thread_id() < group.rows &&
      thread_id() < 1 << params.block_rows_log2)
    prefetch(group.bias + tile_row + thread_id());
  if (params.signs_early) wait_for_previous_kernel();
  let_next_kernel_start();

  float sums[kSlots][2] = {};
  for (int chunk = 0; chunk < items.count; chunk += params.chunk_slices) {
    const int chunk_end =
        chunk + params.chunk_slices < items.count ? chunk + params.chunk_slices : items.count;
    if (chunk > 0) sync_block();  // the chunk before this one has been used up
    stage_items<Mma, kTokens, kExtended>(items, chunk, chunk_end, first_token, tokens, shared);
    if constexpr (kExtended && !Layout::kConvertedAhead)
      if (chunk == 0 && params.extras.normed)
        sum_squares(params, first_token, tokens,
                    reinterpret_cast<float*>(shared + params.chunk_slices * Layout::kBytes) +
                        kWarps * kTileRows * kTokens);
    sync_block();
    for (; item < chunk_end; item += split_warps) {
      const unsigned char* slice_data = shared + (item - chunk) * Layout::kBytes;
      const float* scales = Layout::scales(slice_data);
      const ItemSigns signs = current;
      current = next;
      next = load_item(items, item + 2 * split_warps, first_row, lane);
      Mma::template add<kTokens>(signs.low, signs.high, slice_data, scales,
                                 reinterpret_cast<const int32_t*>(scales + Layout::kScales), lane,
                                 signs.row_scale, sums);
    }
  }

  const int block_rows = 1 << params.block_rows_log2;
  float* partial = reinterpret_cast<float*>(shared + params.chunk_slices * Layout::kBytes);
  Mma::template finish<kTokens>(sums, lane, [&](int token, int half, float sum) {
    partial[(split_warp * kTokens + token) * block_rows + row_warp * kTileRows + lane / 4 + 8 * half] = sum;
  });
  sync_block();
  store_rows<Mma, kTokens, kExtended>(params, group, partial, first_token, tokens, tile_row);
}

// Two blocks on an SM, but where the sums of many tokens need the registers.
template <typename Mma, int kTokens>
LB2_KERNEL(kThreads, Mma::template kSlots<kTokens>* Mma::kSlotCost < 16 ? 2 : 1)
decode(const LB2_GRID_CONSTANT DecodeParams params) {
  decode_block<Mma, kTokens, false>(params);
}

// One block on an SM in float16 modes too, which would spill registers on some GPUs.
// With Extras, apart so that calls without them do not pay for these in registers and code.
template <typename Mma, int kTokens>
LB2_KERNEL(kThreads,
           is_one_bit(Mma::kActivation) && Mma::template kSlots<kTokens> * Mma::kSlotCost < 16 ? 2 : 1)
decode_extended(const LB2_GRID_CONSTANT DecodeParams params) {
  decode_block<Mma, kTokens, true>(params);
}

}  // namespace lb2::cuda
