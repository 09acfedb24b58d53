// The decode kernel of calls as most are: few terms, rows whole and aligned, every item of a block staged at
// once, nothing around the layers. The same sums in the same order as decode.h, hence the same bits, in a
// fraction of the code: what is left between the kernel before and the result is what one token waits for.
#pragma once

#include "cuda/decode/decode.h"
#include "cuda/decode/plain_params.h"

namespace lb2::cuda {

// What a block adds up: a part of the slices of its group's terms.
struct PlainItems {
  const PlainParams* params;
  const Group* group;
  int begin, count;

  // The term and slice of an item, 0 <= item < count.
  LB2_DEVICE const PlainTerm& find(int item, int* slice) const {
    int term = group->first_term;
    *slice = begin + item;
    while (*slice >= params->terms[term].slices) *slice -= params->terms[term++].slices;
    return params->terms[term];
  }
};

LB2_DEVICE PlainItems plain_items(const PlainParams& params) {
  const BlockPart part = block_part(params);
  return {&params, part.group, part.begin, part.count};
}

// Where a lane finds what it needs of one item. Loads are not conditional, as a choice between a loaded word
// and zero makes the compiler wait for it: what is not there is read at the first row, and multiplied by
// activations that are zero.
struct PlainAddress {
  const uint32_t* words;      // the first row
  int offset[2];              // from there, of rows g and g + 8
  const float* row_scale[2];  // NULL for 1
  int count[2];               // words that must be read one by one: at the end of the last row
};

LB2_DEVICE PlainAddress plain_address(const PlainItems& items, int item, int first_row, int lane) {
  const bool exists = item < items.count;
  int slice;
  const PlainTerm& term = items.find(exists ? item : 0, &slice);
  const int rows = items.group->rows, word = slice * kSliceWords + lane % 4 * 4;
  const int left = exists ? (term.cols + LB2_WORD_BITS - 1) / LB2_WORD_BITS - word : 0;
  PlainAddress address;
  address.words = term.words;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Rows past the last one repeat it; their sums are not stored.
    int row = first_row + lane / 4 + 8 * half;
    row = row < rows ? row : rows - 1;
    // What lies between two rows can be read as well: its columns are zero. Nothing lies past the last row.
    const bool wide = left >= 4 || (left > 0 && row + 1 < rows);
    address.offset[half] = left > 0 ? row * term.word_stride + word : 0;
    address.count[half] = wide || left <= 0 ? 0 : left;
    address.row_scale[half] = term.row_scale != nullptr ? term.row_scale + row : nullptr;
  }
  return address;
}

LB2_DEVICE ItemSigns load_plain_item(const PlainAddress& address) {
  ItemSigns signs;
  signs.low = load_stream(address.words + (address.count[0] == 0 ? address.offset[0] : 0));
  signs.high = load_stream(address.words + (address.count[1] == 0 ? address.offset[1] : 0));
#pragma unroll
  for (int half = 0; half < 2; ++half)
    signs.row_scale[half] =
        address.row_scale[half] != nullptr ? load_stream_float(address.row_scale[half]) : 1.0f;
  if ((address.count[0] | address.count[1]) != 0) {
    load_stream_words(address.words + address.offset[0], address.count[0], signs.low);
    load_stream_words(address.words + address.offset[1], address.count[1], signs.high);
  }
  return signs;
}

// What a warp converts in its turn.
struct PlainTurn {
  const char* input;  // a lane's first column
  const float* scale;
  int part_bytes;
  int valid;  // columns of the slice
  int runs;   // of the lane, each whole: 0, 1 or 2
};

template <typename Mma, int kElementBytes>
LB2_DEVICE PlainTurn plain_turn(const PlainItems& items, int item, int token, int lane) {
  int slice;
  const PlainTerm& term = items.find(item, &slice);
  const int first = slice * kSliceCols, left = term.cols - first, col = first + Mma::first_run(lane);
  return {term.input + (token * term.input_bytes + col * kElementBytes), term.scale + col, term.part_bytes,
          left < kSliceCols ? left : kSliceCols, (col < term.cols) + (col + Mma::kRunPitch < term.cols)};
}

// What a lane reads for a turn: the scales, and the columns where they are 16 bits each.
template <typename Mma, bool kHalves>
struct PlainLoads {
  Words4 scale[4], halves[kHalves ? 2 : 1];

  LB2_DEVICE void start(const PlainTurn& turn) {
    if constexpr (kHalves) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        halves[i] = i < turn.runs ? load_words4(turn.input + i * Mma::kRunPitch * 2) : Words4{};
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scale[i] = i / 2 < turn.runs ? load_words4(turn.scale + i / 2 * Mma::kRunPitch + i % 2 * 4) : Words4{};
  }
};

// Parts [part, part + kParts), added in order to `values`, or in place of them; all their loads are under way
// before the first is waited for.
template <typename Mma, int kParts, bool kFirst>
LB2_DEVICE void add_parts(const PlainTurn& turn, int part, float (&values)[kLaneCols]) {
  Words4 parts[kParts][4];
#pragma unroll
  for (int j = 0; j < kParts; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      parts[j][i] = i / 2 < turn.runs ? load_words4(turn.input + (part + j) * turn.part_bytes +
                                                    (i / 2 * Mma::kRunPitch + i % 2 * 4) * 4)
                                      : Words4{};
#pragma unroll
  for (int j = 0; j < kParts; ++j)
#pragma unroll
    for (int i = 0; i < kLaneCols; ++i) {
      const float value = bits_float(parts[j][i / 4].w[i % 4]);
      values[i] = kFirst && j == 0 ? value : values[i] + value;
    }
}

// The scaled columns of a turn whose loads have started.
template <typename Mma, bool kHalves>
LB2_DEVICE void finish_loads(const PlainTurn& turn, const PlainLoads<Mma, kHalves>& loads, int num_parts,
                             lb2_dtype dtype, float (&values)[kLaneCols]) {
  if constexpr (kHalves) {
    const auto convert = [&](lb2_dtype known) {
#pragma unroll
      for (int i = 0; i < kLaneCols; ++i) {
        const uint32_t two = loads.halves[i / kRunCols].w[i % kRunCols / 2];
        values[i] = half_value(i % 2 == 0 ? two & 0xFFFFu : two >> 16, known);
      }
    };
    if (dtype == LB2_FLOAT16)
      convert(LB2_FLOAT16);
    else
      convert(LB2_BFLOAT16);
  } else {
    if (num_parts == 1) {
      add_parts<Mma, 1, true>(turn, 0, values);
    } else {
      add_parts<Mma, 2, true>(turn, 0, values);
#pragma unroll 1
      for (int part = 2; part < num_parts; ++part) add_parts<Mma, 1, false>(turn, part, values);
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneCols; ++i) values[i] *= bits_float(loads.scale[i / 4].w[i % 4]);
}

// kHalves: the input is float16 or bfloat16, in one part.
template <typename Mma, int kTokens, bool kHalves>
LB2_DEVICE void plain_block(const PlainParams& params) {
  using Layout = SliceLayout<Mma, kTokens>;
  constexpr int kSlots = Mma::template kSlots<kTokens>;
  constexpr int kElementBytes = kHalves ? 2 : 4;
  const int warp = thread_id() / kWarpLanes, lane = thread_id() % kWarpLanes;
  const int row_warp = warp & ((1 << params.row_warps_log2) - 1), split_warp = warp >> params.row_warps_log2;
  const int split_warps = kWarps >> params.row_warps_log2;
  const int first_token = block_z() * kTokens;
  const int tokens = params.m - first_token < kTokens ? params.m - first_token : kTokens;
  unsigned char* shared = shared_memory();

  // All that parameters decide comes before the wait. Nothing is read there that the kernel before this one
  // may have written; to have it cached does no harm.
  const PlainItems items = plain_items(params);
  const Group& group = *items.group;
  const int rows_log2 = kTileRowsLog2 + params.row_warps_log2;
  const BlockRows rows = {&group, rows_log2, (block_x() - group.first_tile) << rows_log2};
  const int first_row = rows.first + row_warp * kTileRows;
  const PlainAddress first = plain_address(items, split_warp, first_row, lane);
  const PlainAddress second = plain_address(items, split_warp + split_warps, first_row, lane);
  // Tokens past the last one repeat it; columns of an MMA do not mix, and nothing of theirs is stored.
  const auto token_of = [&](int index) {
    const int token = index % kTokens;
    return first_token + (kTokens == 1 || token < tokens ? token : tokens - 1);
  };
  int turn_index = warp;
  PlainTurn turn = {};
  if (turn_index / kTokens < items.count) {
    turn = plain_turn<Mma, kElementBytes>(items, turn_index / kTokens, token_of(turn_index), lane);
    if (turn.runs > 0) prefetch(turn.scale);
  }
  const float* bias_address =
      group.bias != nullptr && rows.stores() ? group.bias + rows.first + rows.own() : nullptr;
  // Activations are what everything waits for: where they are read beside weights, they come first.
  const bool signs_early = !kHalves && params.signs_early;
  if (!signs_early) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      prefetch(first.words + first.offset[half]);
      prefetch(second.words + second.offset[half]);
    }
    wait_for_previous_kernel();
  }
  PlainLoads<Mma, kHalves> loads;
  if constexpr (kHalves) loads.start(turn);
  ItemSigns even = load_plain_item(first), odd = load_plain_item(second);
  const float bias = bias_address != nullptr ? load_stream_float(bias_address) : 0.0f;
  if constexpr (!kHalves) loads.start(turn);  // scales alone
  if (signs_early) wait_for_previous_kernel();
  let_next_kernel_start();

  const int turns = items.count * kTokens;
#pragma unroll 1
  while (turn_index < turns) {
    const int token = turn_index % kTokens;
    unsigned char* slice_data = shared + turn_index / kTokens * Layout::kBytes;
    float values[kLaneCols];
    finish_loads<Mma, kHalves>(turn, loads, params.num_parts, params.input_dtype, values);
    const int valid = turn.valid;
    turn_index += kWarps;
    if (turn_index < turns) {
      turn = plain_turn<Mma, kElementBytes>(items, turn_index / kTokens, token_of(turn_index), lane);
      loads.start(turn);
    }
    float* scales = Layout::scales(slice_data);
    Mma::stage(values, lane, valid, token, slice_data, scales + token,
               reinterpret_cast<int32_t*>(scales + Layout::kScales) + token);
  }
  sync_block();

  float sums[kSlots][2] = {};
  int item = split_warp;
  const auto add_item = [&](ItemSigns& signs) {
    const unsigned char* slice_data = shared + item * Layout::kBytes;
    const float* scales = Layout::scales(slice_data);
    Mma::template add<kTokens>(signs.low, signs.high, slice_data, scales,
                               reinterpret_cast<const int32_t*>(scales + Layout::kScales), lane,
                               signs.row_scale, sums);
    if (item + 2 * split_warps < items.count)
      signs = load_plain_item(plain_address(items, item + 2 * split_warps, first_row, lane));
    item += split_warps;
  };
  // Two items are in flight, each in registers of its own: to move one to the other's would wait for it.
#pragma unroll 1
  while (item < items.count) {
    add_item(even);
    if (item >= items.count) break;
    add_item(odd);
  }

  float* partial = reinterpret_cast<float*>(shared + params.partial_offset);
  Mma::template finish<kTokens>(sums, lane, [&](int token, int half, float sum) {
    partial[((split_warp * kTokens + token) << rows_log2) + row_warp * kTileRows + lane / 4 + 8 * half] = sum;
  });
  sync_block();
  if (!rows.stores()) return;
  const int64_t first_store = static_cast<int64_t>(block_y()) * params.m + first_token;
  for (int token = thread_id() >> rows_log2; token < tokens; token += kThreads >> rows_log2)
    store_element(group.output, (first_store + token) * group.output_stride + rows.first + rows.own(),
                  params.output_dtype, bias + sum_of_warps<kTokens>(partial, rows, split_warps, token));
}

// Blocks on an SM: three, so that those of both stages of a large layer are there at once, where the sums
// leave room in the registers for that.
template <typename Mma, int kTokens>
constexpr int kPlainBlocks =
    Mma::template kSlots<kTokens> * Mma::kSlotCost >= 16                                       ? 1
    : has_three_blocks(Mma::kActivation) && Mma::template kSlots<kTokens> * Mma::kSlotCost < 8 ? 3
                                                                                               : 2;

template <typename Mma, int kTokens, bool kHalves>
LB2_KERNEL(kThreads, kPlainBlocks<Mma, kTokens>)
decode_plain(const LB2_GRID_CONSTANT PlainParams params) {
  plain_block<Mma, kTokens, kHalves>(params);
}

}  // namespace lb2::cuda
