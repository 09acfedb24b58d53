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

// The group of a block and its part of the slices of the group's terms, counted from the first term on.
struct BlockPart {
  const Group* group;
  int begin, count;
};

template <typename Params>
LB2_DEVICE BlockPart block_part(const Params& params) {
  int index = 0;
  while (index + 1 < params.num_groups && params.groups[index + 1].first_tile <= block_x()) ++index;
  const Group& group = params.groups[index];
  const int part = block_y(), longer = part < group.part_rest;
  const int begin = part * group.part_slices + (longer ? part : group.part_rest);
  return {&group, begin, group.part_slices + longer};
}

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
  const BlockPart part = block_part(params);
  return {&params, part.group, part.begin, part.count};
}

// Where a lane finds what it needs of one item: the words of rows g and g + 8, and what their sums are
// multiplied by. Parameters alone decide, so that it is known before the kernel waits for the one before it.
struct ItemAddress {
  const uint32_t* words[2];
  const float* row_scale[2];  // NULL for 1
  int count;                  // words of the row from there on, at most 4; 0 for none
  bool wide[2];               // whether 16 bytes can be read at once
};

struct ItemSigns {
  Words4 low, high;
  float row_scale[2];
};

LB2_DEVICE ItemAddress item_address(const Items& items, int item, int first_row, int lane) {
  ItemAddress address = {};
  if (item >= items.count) return address;
  const Items::Place place = items[item];
  const Term& term = items.params->terms[place.term];
  const int rows = items.group->rows;
  const int row_words = (term.cols + LB2_WORD_BITS - 1) / LB2_WORD_BITS;
  const int word = place.slice * kSliceWords + lane % 4 * 4;
  const bool aligned = aligned16(term.words) && (term.word_stride & 3) == 0;
  const int left = row_words - word;
  address.count = left < 0 ? 0 : left < 4 ? left : 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Rows past the last one repeat it; their sums are not stored.
    int row = first_row + lane / 4 + 8 * half;
    row = row < rows ? row : rows - 1;
    // What lies between two rows can be read as well: its columns are zero. Nothing lies past the last row.
    const int readable = row + 1 < rows ? static_cast<int>(term.word_stride) : row_words;
    address.words[half] = term.words + row * term.word_stride + word;
    address.wide[half] = aligned && left > 0 && word + 4 <= readable;
    address.row_scale[half] = term.row_scale != nullptr ? term.row_scale + row : nullptr;
  }
  return address;
}

LB2_DEVICE ItemSigns load_item(const ItemAddress& address) {
  ItemSigns signs;
  signs.low = load_stream(address.words[0], address.wide[0]);
  signs.high = load_stream(address.words[1], address.wide[1]);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    signs.row_scale[half] = address.row_scale[half] != nullptr ? *address.row_scale[half] : 1.0f;
  if (!(address.wide[0] && address.wide[1])) {
    load_stream_words(address.words[0], address.wide[0] ? 0 : address.count, signs.low);
    load_stream_words(address.words[1], address.wide[1] ? 0 : address.count, signs.high);
  }
  return signs;
}

// The signs of four items into the L2 cache, so that memory is busy while activations are staged: lane (g, t)
// asks for rows g and g + 8 of one of them.
LB2_DEVICE void prefetch_items(const Items& items, int item, int step, int first_row, int lane) {
  const int ahead = item + lane % 4 * step;
  if (ahead >= items.count) return;
  const Items::Place place = items[ahead];
  const Term& term = items.params->terms[place.term];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + 8 * half;
    if (row < items.group->rows) prefetch(term.words + row * term.word_stride + place.slice * kSliceWords);
  }
}

// Copies what a launch of convert left of items [begin, end) to shared memory. Others see it after a barrier.
template <typename Mma, int kTokens>
LB2_DEVICE void copy_items(const Items& items, int begin, int end, unsigned char* shared) {
  constexpr int kBytes = SliceLayout<Mma, kTokens>::kBytes;
  for (int item = begin; item < end; ++item) {
    const Items::Place place = items[item];
    const unsigned char* source =
        converted_slice<Mma, kTokens>(items.params->terms[place.term], block_z(), place.slice);
    unsigned char* target = shared + (item - begin) * kBytes;
    for (int at = thread_id() * 16; at < kBytes; at += kThreads * 16) copy_words4(target + at, source + at);
  }
  wait_for_copies();
}

// The next slice of a token that a warp converts: warps take turns, token by token of an item.
template <typename Mma, int kTokens>
struct Turn {
  int index;  // counted from the first item of the chunk on
  Conversion work;

  LB2_DEVICE void find(const Items& items, int begin, int end, int first_token) {
    const int item = begin + index / kTokens;
    if (item >= end) return;
    const Items::Place place = items[item];
    work = conversion_of<Mma>(*items.params, items.params->terms[place.term], place.slice,
                              first_token + index % kTokens);
  }
};

// Brings the activations of items [begin, end) into shared memory. Others see them after a barrier. The
// warp's first turn has been found.
template <typename Mma, int kTokens, bool kExtended>
LB2_DEVICE void stage_items(const Items& items, int begin, int end, int first_token, int tokens,
                            Turn<Mma, kTokens>& turn, unsigned char* shared) {
  while (turn.index < (end - begin) * kTokens) {
    const int token = turn.index % kTokens;
    if (token < tokens)
      convert_slice<Mma, kTokens, kExtended>(
          *items.params, turn.work, first_token, token,
          shared + turn.index / kTokens * SliceLayout<Mma, kTokens>::kBytes);
    turn.index += kWarps;
    turn.find(items, begin, end, first_token);
  }
}

// What the first turn will be multiplied by, into the L2 cache: no launch of ours writes it.
template <bool kExtended>
LB2_DEVICE void prefetch_scales(const DecodeParams& params, const Conversion& work) {
  if (work.cols[0] >= work.source.cols) return;
  prefetch(work.source.scale + work.cols[0]);
  if constexpr (kExtended) {
    const Extras& extras = params.extras;
    const int element_bytes = extras.factor_dtype == LB2_FLOAT32 ? 4 : 2;
    // A factor of each token comes from the kernel before this one.
    if (extras.factor != nullptr && extras.factor_stride == 0)
      prefetch(static_cast<const char*>(extras.factor) + static_cast<int64_t>(work.cols[0]) * element_bytes);
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

// Where a block's rows lie. Its threads store sums row by row, then token by token; a thread keeps to one
// row.
struct BlockRows {
  const Group* group;
  int log2;   // of the rows of a block
  int first;  // row of the group

  LB2_DEVICE int count() const { return 1 << log2; }
  LB2_DEVICE int own() const { return thread_id() & (count() - 1); }  // this thread's row, counted from first
  LB2_DEVICE bool stores() const { return first + own() < group->rows; }
};

// The sum of the warps that share this thread's row, in their order: partial[split_warp][token][row of the
// block].
template <int kTokens>
LB2_DEVICE float sum_of_warps(const float* partial, const BlockRows& rows, int split_warps, int token) {
  float sum = 0.0f;
#pragma unroll
  for (int split = 0; split < kWarps; ++split)
    sum += split < split_warps ? partial[((split * kTokens + token) << rows.log2) + rows.own()] : 0.0f;
  return sum;
}

// Adds up the sums of the warps that share rows, and stores them.
template <typename Mma, int kTokens, bool kExtended>
LB2_DEVICE void store_rows(const DecodeParams& params, const BlockRows& rows, float bias,
                           const float* partial, int first_token, int tokens) {
  if (!rows.stores()) return;
  const Group& group = *rows.group;
  const int split_warps = kWarps >> params.row_warps_log2, row = rows.first + rows.own();
  const int64_t first_row = static_cast<int64_t>(block_y()) * params.m + first_token;
  for (int token = thread_id() >> rows.log2; token < tokens; token += kThreads >> rows.log2) {
    float parts = sum_of_warps<kTokens>(partial, rows, split_warps, token), sum = bias;
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
  const int row_warp = warp & ((1 << params.row_warps_log2) - 1), split_warp = warp >> params.row_warps_log2;
  const int split_warps = kWarps >> params.row_warps_log2;
  const int first_token = block_z() * kTokens;
  const int tokens = params.m - first_token < kTokens ? params.m - first_token : kTokens;
  unsigned char* shared = shared_memory();

  // All that parameters decide comes before the wait.
  const Items items = block_items(params);
  const int rows_log2 = kTileRowsLog2 + params.row_warps_log2;
  const BlockRows rows = {items.group, rows_log2, (block_x() - items.group->first_tile) << rows_log2};
  const int first_row = rows.first + row_warp * kTileRows;
  int item = split_warp;
  const ItemAddress first = item_address(items, item, first_row, lane);
  const ItemAddress second = item_address(items, item + split_warps, first_row, lane);
  int chunk_end = params.chunk_slices < items.count ? params.chunk_slices : items.count;
  Turn<Mma, kTokens> turn = {warp, {}};
  if constexpr (!Layout::kConvertedAhead) {
    turn.find(items, 0, chunk_end, first_token);
    if (warp / kTokens < chunk_end) prefetch_scales<kExtended>(params, turn.work);
  }
  // The kernel before this one may have written anything, unless it is known to have left the layer alone:
  // then nothing is read before the wait, but cached.
  prefetch_items(items, item + (params.signs_early ? 2 * split_warps : 0), split_warps, first_row, lane);
  if (!params.signs_early) wait_for_previous_kernel();
  ItemSigns current = load_item(first);
  ItemSigns next = load_item(second);
  const float bias =
      items.group->bias != nullptr && rows.stores() ? items.group->bias[rows.first + rows.own()] : 0.0f;
  if (params.signs_early) wait_for_previous_kernel();
  let_next_kernel_start();

  float sums[kSlots][2] = {};
  for (int chunk = 0; chunk < items.count; chunk += params.chunk_slices) {
    if (chunk > 0) {
      chunk_end = chunk + params.chunk_slices < items.count ? chunk + params.chunk_slices : items.count;
      turn.index = warp;
      if constexpr (!Layout::kConvertedAhead) turn.find(items, chunk, chunk_end, first_token);
      sync_block();  // the chunk before this one has been used up
    }
    if constexpr (Layout::kConvertedAhead)
      copy_items<Mma, kTokens>(items, chunk, chunk_end, shared);
    else
      stage_items<Mma, kTokens, kExtended>(items, chunk, chunk_end, first_token, tokens, turn, shared);
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
      next = load_item(item_address(items, item + 2 * split_warps, first_row, lane));
      Mma::template add<kTokens>(signs.low, signs.high, slice_data, scales,
                                 reinterpret_cast<const int32_t*>(scales + Layout::kScales), lane,
                                 signs.row_scale, sums);
    }
  }

  float* partial = reinterpret_cast<float*>(shared + params.chunk_slices * Layout::kBytes);
  Mma::template finish<kTokens>(sums, lane, [&](int token, int half, float sum) {
    partial[((split_warp * kTokens + token) << rows.log2) + row_warp * kTileRows + lane / 4 + 8 * half] = sum;
  });
  sync_block();
  store_rows<Mma, kTokens, kExtended>(params, rows, bias, partial, first_token, tokens);
}

// Two blocks on an SM, but where the sums of many tokens need the registers.
template <typename Mma, int kTokens>
constexpr bool kTwoBlocks =
    Mma::template kSlots<kTokens> * Mma::kSlotCost < (converts_ahead(kTokens) ? 16 : 8);

template <typename Mma, int kTokens>
LB2_KERNEL(kThreads, kTwoBlocks<Mma, kTokens> ? 2 : 1)
decode(const LB2_GRID_CONSTANT DecodeParams params) {
  decode_block<Mma, kTokens, false>(params);
}

// One block on an SM in float16 modes too, which would spill registers on some GPUs.
// With Extras, apart so that calls without them do not pay for these in registers and code.
template <typename Mma, int kTokens>
LB2_KERNEL(kThreads, is_one_bit(Mma::kActivation) && kTwoBlocks<Mma, kTokens> ? 2 : 1)
decode_extended(const LB2_GRID_CONSTANT DecodeParams params) {
  decode_block<Mma, kTokens, true>(params);
}

}  // namespace lb2::cuda
