// Both stages of a layer in one kernel, for ranks whose latents fit on chip.
//
// A cluster of 1 to 8 blocks computes 32 tokens. Its blocks divide the columns of the first stages: each
// converts its slices of the activations (gemm/convert.h) and multiplies them. The sums stay in its shared
// memory, separately for each slice if there are several blocks. Then each block adds up the latents of some
// of the tokens, in the order of slices, converts them and sends them to the other blocks. Last, each block
// computes some of the output rows. Only x, signs and scales are read and only y is written. Every sum is
// taken in the order of the GEMM (gemm.h), so results have the same bits.
//
// Signs go from global memory to registers; those of the next 128 columns are loaded during the MMAs. Only
// one warp of the cluster uses a given row.
#pragma once

#include "cuda/fused/params.h"
#include "cuda/gemm/convert.h"
#include "cuda/gemm/multiply.h"

namespace lb2::cuda {

// A lane's words of two tiles of rows, g and g + 8 of each.
using FusedWords = uint32_t[kFusedRowTiles][2];

// Rows of signs of a warp: `row` is the lane's in the first tile, `step` rows before that in the second.
struct SignRows {
  const uint32_t* words;
  int64_t stride;
  int row, step, rows, cols;

  // Word t of the index that `word` begins, zero where there is none.
  LB2_DEVICE void load(int word, int lane, FusedWords& out) const {
    const int at = word + lane % 4;
    const bool in_row = at * LB2_WORD_BITS < cols;
#pragma unroll
    for (int tile = 0; tile < kFusedRowTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = row + tile * step + 8 * half;
        out[tile][half] = in_row && own < rows ? load_stream_word(words + own * stride + at) : 0;
      }
  }
};

template <typename Operand>
struct FusedBlock {
  static constexpr lb2_activation kActivation = Operand::kActivation;
  static constexpr int kQuarters = Operand::kQuarters;
  static constexpr int kStepBytes = gemm_step_bytes(kActivation);
  static constexpr int kBlockBytes = Operand::kBlockBytes;
  static constexpr int kBufferBytes = fused_buffer_bytes(kActivation);
  static constexpr int kIndexBytes = fused_index_bytes(kActivation);
  using Sums = typename Operand::Sum[kFusedRowTiles][kFusedGroups][4];
  using Floats = float[kFusedRowTiles][kFusedGroups][4];

  const FusedParams& params;
  unsigned char* early;  // converted activations, then latents
  float* parts;
  int lane, warp;
  int blocks, rank;  // of the cluster, and this one's in it
  int first_token, tokens;
  int first_slice, slices;  // of the block

  LB2_DEVICE int first_slice_of(int block) const { return (params.slices * block) >> params.blocks_log2; }

  // A walk over what a block multiplies: rows of a first stage, as many as its warps have tiles for, and a
  // slice of them. Where sums of a slice stay apart, all rows of a slice follow one another, and use what was
  // converted for the first ones.
  struct Item {
    int first, chunk, slice, buffer;
  };
  LB2_DEVICE bool is_there(const Item& at) const { return at.first < params.num_firsts; }
  LB2_DEVICE bool is_converted(const Item& at) const { return blocks == 1 || at.chunk == 0; }
  LB2_DEVICE Item after(Item at) const {
    const int chunks = (params.firsts[at.first].rank + kFusedChunkRows - 1) / kFusedChunkRows;
    if (blocks > 1) {
      if (++at.chunk < chunks) return at;
      at.chunk = 0;
    }
    at.buffer ^= 1;
    if (++at.slice < slices) return at;
    at.slice = 0;
    if (blocks == 1 && ++at.chunk < chunks) return at;
    at.chunk = 0;
    ++at.first;
    return at;
  }
  LB2_DEVICE unsigned char* buffer(const Item& at) const { return early + at.buffer * kBufferBytes; }

  // Converts the activations of an item to tensor-core layout. A warp handles one token of each group.
  LB2_DEVICE void convert_item(const Item& at) const {
    const FusedFirst& first = params.firsts[at.first];
    const int slice = first_slice + at.slice;
    const int cols[2] = {slice * kSliceCols + converted_run(lane),
                         slice * kSliceCols + converted_run(lane) + 16};
    const int64_t row_bytes = params.input_stride * (params.input_dtype == LB2_FLOAT32 ? 4 : 2);
    const bool inside = lane / 8 < slice_indices(params.cols, slice);
    float scale[kLaneCols];
    load_runs<false>({reinterpret_cast<const char*>(first.scale), nullptr, 0, 1, params.cols, LB2_FLOAT32},
                     cols, scale);
#pragma unroll 1
    for (int group = 0; group < kFusedGroups; ++group) {
      const int token = group * kGroupTokens + warp;
      if (token >= tokens) break;
      const char* row = static_cast<const char*>(params.input) + (first_token + token) * row_bytes;
      float values[kLaneCols];
      load_runs<false>({row, nullptr, 0, 1, params.cols, params.input_dtype}, cols, values);
#pragma unroll
      for (int i = 0; i < kLaneCols; ++i) values[i] *= scale[i];
      store_converted<Operand>(values, lane, warp, inside, buffer(at) + group * kBlockBytes, kBlockBytes);
    }
  }

  // A slice of the activations: into the L2 cache.
  LB2_DEVICE void prefetch_slice(int slice) const {
    constexpr int kLine = 128, kThreadsPerToken = kThreads / kFusedTokens;
    const int element_bytes = params.input_dtype == LB2_FLOAT32 ? 4 : 2;
    const int token = thread_id() / kThreadsPerToken;
    if (slice >= slices || token >= tokens) return;
    const char* row =
        static_cast<const char*>(params.input) + (first_token + token) * params.input_stride * element_bytes;
    const int first = (first_slice + slice) * kSliceCols * element_bytes;
    for (int line = thread_id() % kThreadsPerToken; line < kSliceCols * element_bytes / kLine;
         line += kThreadsPerToken)
      if (first + line * kLine < params.cols * element_bytes) prefetch(row + first + line * kLine);
  }

  // Warps take tiles of rows in turn, lest one scheduler of an SM have them all.
  LB2_DEVICE SignRows first_rows(const Item& at) const {
    const FusedFirst& first = params.firsts[at.first];
    return {first.words,        first.word_stride, at.chunk * kFusedChunkRows + warp * kTileRows + lane / 4,
            kWarps * kTileRows, first.rank,        params.cols};
  }
  LB2_DEVICE void load_first(const Item& at, FusedWords& words) const {
    if (is_there(at)) first_rows(at).load((first_slice + at.slice) * kSliceWords, lane, words);
  }

  // Products of a slice for as many tiles. `words` are those of its first index; `load_next` puts what will
  // be multiplied after it in their place.
  template <int kTiles, typename LoadNext>
  LB2_DEVICE void multiply_slice(const SignRows& rows, int slice, int indices, const unsigned char* data,
                                 int group_bytes, FusedWords& words, const LoadNext& load_next, Sums& sums,
                                 Floats& chains) const {
#pragma unroll 1
    for (int index = 0; index < indices; ++index) {
      uint32_t now[kTiles][2];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) now[i / 2][i % 2] = words[i / 2][i % 2];
      if (index + 1 < indices)
        rows.load(slice * kSliceWords + (index + 1) * 4, lane, words);
      else
        load_next(words);
#pragma unroll
      for (int step = 0; step < kQuarters; ++step)
        multiply_step<Operand, kTiles, kFusedGroups>(
            now, step, data + (index * kQuarters + step) * kStepBytes + lane * 16, group_bytes, sums);
      if constexpr (Operand::kShortChains) end_chains(sums, chains);
    }
  }

  // Adds the products of an item; `total` are the sums of its rows so far. `words` become the next one's.
  LB2_DEVICE void multiply_item(const Item& at, const Item& next, FusedWords& words, Floats& total) const {
    const FusedFirst& first = params.firsts[at.first];
    const int slice = first_slice + at.slice, first_row = at.chunk * kFusedChunkRows;
    const int tiles = (first.rank - first_row + kTileRows - 1) / kTileRows - warp;
    const auto load_next = [&](FusedWords& others) { load_first(next, others); };
    if (tiles <= 0) {
      load_next(words);
      return;
    }
    const SignRows rows = first_rows(at);
    const int indices = slice_indices(params.cols, slice);
    Sums sums;
    Floats chains;
    set_zero(sums);
    set_zero(chains);
    if (tiles > kWarps)
      multiply_slice<2>(rows, slice, indices, buffer(at), kBlockBytes, words, load_next, sums, chains);
    else
      multiply_slice<1>(rows, slice, indices, buffer(at), kBlockBytes, words, load_next, sums, chains);
    const float row_scale[kFusedRowTiles][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
    add_slice<Operand, kFusedRowTiles, kFusedGroups>(buffer(at) + kBlockBytes - kGemmTailBytes + lane % 4 * 8,
                                                     row_scale, sums, chains, total, kBlockBytes);
    if (blocks == 1 && at.slice + 1 < slices) return;
    float* part = parts + (blocks == 1 ? 0 : at.slice) * kFusedTokens * params.part_pitch + first.row +
                  first_row + warp * kTileRows + lane / 4;
#pragma unroll
    for (int tile = 0; tile < kFusedRowTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4 * kFusedGroups; ++i) {
        const int token = i / 4 * kGroupTokens + lane % 4 * 2 + i % 2;
        if (tile == 0 || tiles > kWarps)
          part[token * params.part_pitch + tile * kWarps * kTileRows + i % 4 / 2 * 8] =
              total[tile][i / 4][i % 4];
      }
    set_zero(total);
  }

  LB2_DEVICE void first_stages() const {
    if (slices == 0) return;
    Item at = {0, 0, 0, 0};
    FusedWords words = {};
    load_first(at, words);
    prefetch_slice(1);
    convert_item(at);
    Floats total;
    set_zero(total);
#pragma unroll 1
    while (is_there(at)) {
      const Item next = after(at);
      // What was converted is there, and what had been before it is used up.
      if (is_converted(at)) sync_block();
      if (next.first == 0 && next.chunk == 0) prefetch_slice(next.slice + 1);
      // Of the two warps of a scheduler one converts while the other multiplies.
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        if ((half == 0) == (warp < kWarps / 2))
          multiply_item(at, next, words, total);
        else if (is_there(next) && is_converted(next))
          convert_item(next);
      }
      at = next;
    }
  }

  // A run of 8 of a token's latents, parts added in order, times their scale; zero past the last one.
  LB2_DEVICE void load_latents(const FusedTerm& term, int token, int col, float* out) const {
    const int num_parts = blocks == 1 ? 1 : params.slices;
    const int at = token * params.part_pitch + params.firsts[term.first].row + col;
#pragma unroll
    for (int i = 0; i < kRunCols; ++i) out[i] = 0.0f;
    if (col >= term.rank) return;
    constexpr int kAtOnce = 4;
    int owner = 0;
#pragma unroll 1
    for (int first = 0; first < num_parts; first += kAtOnce) {
      Words4 more[kAtOnce][2];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (first + j < num_parts) {
          const int part = first + j;
          while (part >= first_slice_of(owner + 1)) ++owner;
          float* own = parts + (part - first_slice_of(owner)) * kFusedTokens * params.part_pitch + at;
          const float* source = blocks == 1 ? own : static_cast<float*>(shared_of_block(own, owner));
          more[j][0] = load_words4(source);
          more[j][1] = load_words4(source + 4);
        }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (first + j < num_parts)
#pragma unroll
          for (int i = 0; i < kRunCols; ++i) {
            const float part = bits_float(more[j][i / 4].w[i % 4]);
            out[i] = first + j == 0 ? part : out[i] + part;
          }
    }
#pragma unroll
    for (int i = 0; i < kRunCols; ++i) out[i] = col + i < term.rank ? out[i] * term.scale[col + i] : 0.0f;
  }

  // Converts the latents of the tokens of the block to tensor-core layout.
  LB2_DEVICE void convert_latents() const {
    const int count = kFusedTokens >> params.blocks_log2, log2 = kFusedTokensLog2 - params.blocks_log2;
    int unit = warp;
    for (int i = 0; i < params.num_terms; ++i) {
      const FusedTerm& term = params.terms[i];
      for (; unit < count * term.slices; unit += kWarps) {
        const int slice = unit >> log2, token = rank * count + (unit & (count - 1));
        if (token >= tokens) continue;
        const int col = slice * kSliceCols + converted_run(lane);
        float values[kLaneCols];
        load_latents(term, token, col, values);
        load_latents(term, token, col + 16, values + kRunCols);
        const int indices = slice_indices(term.rank, slice);
        const int bytes = group_bytes(indices);
        store_converted<Operand>(values, lane, token % kGroupTokens, lane / 8 < indices,
                                 latents(term, slice) + token / kGroupTokens * bytes, bytes);
      }
      unit -= count * term.slices;
    }
  }

  // Of a slice of a term's latents, for a group of tokens.
  LB2_DEVICE static int group_bytes(int indices) { return indices * kIndexBytes + kGemmTailBytes; }
  LB2_DEVICE unsigned char* latents(const FusedTerm& term, int slice) const {
    return early + term.offset + slice * kBufferBytes;
  }

  LB2_DEVICE void give_away(void* own) const {
    const Words4 words = load_words4(own);
    for (int i = 1; i < blocks; ++i)
      *static_cast<Words4*>(shared_of_block(own, (rank + i) & (blocks - 1))) = words;
  }

  // Sends the converted latents of the tokens of the block to the other blocks.
  LB2_DEVICE void share_latents() const {
    const int count = kFusedTokens >> params.blocks_log2, log2 = kFusedTokensLog2 - params.blocks_log2;
    const int first = rank * count;
    for (int i = 0; i < params.num_terms; ++i)
      for (int slice = 0; slice < params.terms[i].slices; ++slice) {
        const int indices = slice_indices(params.terms[i].rank, slice);
        const int bytes = group_bytes(indices);
        const int lines = indices * kQuarters * Operand::kTerms;
        unsigned char* block = latents(params.terms[i], slice);
        for (int item = thread_id(); item < lines * count * 4; item += kThreads) {
          const int token = first + (item / 4 & (count - 1)), line = item / 4 >> log2;
          give_away(block + token / kGroupTokens * bytes +
                    (line * kWarpLanes + token % kGroupTokens * 4 + item % 4) * 16);
        }
        // Scales and sums of four tokens.
        const int quads = 2 * count / 4;
        if (thread_id() < quads) {
          const int token = first + thread_id() / 2 * 4;
          give_away(block + (token / kGroupTokens + 1) * bytes - kGemmTailBytes +
                    (thread_id() % 2 * kGroupTokens + token % kGroupTokens) * 4);
        }
      }
  }

  // A walk over the slices of the units of a warp.
  struct Cursor {
    int unit, layer, term, slice;
  };
  LB2_DEVICE void enter_unit(Cursor& at) const {
    while (at.layer + 1 < params.num_layers && params.layers[at.layer + 1].first_tile <= at.unit) ++at.layer;
    at.term = params.layers[at.layer].first_term;
    at.slice = 0;
  }
  LB2_DEVICE void advance(Cursor& at) const {
    if (++at.slice < params.terms[at.term].slices) return;
    at.slice = 0;
    if (++at.term < params.layers[at.layer].last_term) return;
    at.unit += kWarps;
    if (at.unit < params.num_units) enter_unit(at);
  }
  LB2_DEVICE int unit_row(const Cursor& at) const {
    return (at.unit - params.layers[at.layer].first_tile) * kFusedUnitRows;
  }
  LB2_DEVICE SignRows last_rows(const Cursor& at) const {
    const FusedTerm& term = params.terms[at.term];
    return {term.words, term.word_stride, unit_row(at) + lane / 4, kTileRows, params.layers[at.layer].rows,
            term.rank};
  }

  // The outputs of the block's units, each a warp's.
  LB2_DEVICE void last_stage() const {
    const int end = (params.num_units * (rank + 1)) >> params.blocks_log2;
    Cursor at = {((params.num_units * rank) >> params.blocks_log2) + warp, 0, 0, 0};
    if (at.unit >= end) return;
    float* outputs =
        reinterpret_cast<float*>(early + params.store_offset) + warp * kFusedTokens * kFusedStorePitch;
    FusedWords words = {};
    enter_unit(at);
    last_rows(at).load(0, lane, words);
#pragma unroll 1
    while (at.unit < end) {
      const Group& layer = params.layers[at.layer];
      const int row = unit_row(at), unit = at.unit;
      Floats total;
      set_zero(total);
#pragma unroll 1
      while (at.unit == unit) {
        const FusedTerm& term = params.terms[at.term];
        const SignRows rows = last_rows(at);
        const int slice = at.slice, indices = slice_indices(term.rank, slice);
        const int bytes = group_bytes(indices);
        float row_scale[kFusedRowTiles][2];
#pragma unroll
        for (int i = 0; i < 2 * kFusedRowTiles; ++i) {
          const int own = rows.row + i / 2 * kTileRows + i % 2 * 8;
          row_scale[i / 2][i % 2] = own < layer.rows ? term.row_scale[own] : 1.0f;
        }
        advance(at);
        const auto load_next = [&](FusedWords& next) {
          if (at.unit < end) last_rows(at).load(at.slice * kSliceWords, lane, next);
        };
        Sums sums;
        Floats chains;
        set_zero(sums);
        set_zero(chains);
        const unsigned char* data = latents(term, slice);
        multiply_slice<2>(rows, slice, indices, data, bytes, words, load_next, sums, chains);
        add_slice<Operand, kFusedRowTiles, kFusedGroups>(data + bytes - kGemmTailBytes + lane % 4 * 8,
                                                         row_scale, sums, chains, total, bytes);
      }
      store_unit(layer, row, total, outputs);
    }
  }

  LB2_DEVICE void store_unit(const Group& layer, int first_row, const Floats& total, float* outputs) const {
    sync_warp();  // what was there has been stored
#pragma unroll
    for (int tile = 0; tile < kFusedRowTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4 * kFusedGroups; ++i) {
        const int token = i / 4 * kGroupTokens + lane % 4 * 2 + i % 2;
        outputs[token * kFusedStorePitch + tile * kTileRows + lane / 4 + i % 4 / 2 * 8] =
            total[tile][i / 4][i % 4];
      }
    sync_warp();
    constexpr int kQuads = kFusedUnitRows / 4;
    const int64_t stride = layer.output_stride;
    const bool wide = is_wide(layer, params.output_dtype);
    const int row = first_row + lane % kQuads * 4;
#pragma unroll 1
    for (int token = lane / kQuads; token < tokens; token += kWarpLanes / kQuads)
      if (row < layer.rows)
        store_sums(layer, params.output_dtype, (first_token + token) * stride + row, row,
                   load_words4(outputs + token * kFusedStorePitch + lane % kQuads * 4), wide);
  }
};

LB2_DEVICE void sync_blocks(int blocks) {
  if (blocks == 1)
    sync_block();
  else
    sync_cluster();
}

template <typename Operand>
LB2_DEVICE void fused_block(const FusedParams& params) {
  unsigned char* shared = shared_memory();
  const int first_token = block_z() * kFusedTokens, left = params.m - first_token;
  FusedBlock<Operand> block = {params,
                               shared,
                               reinterpret_cast<float*>(shared + params.part_offset),
                               thread_id() % kWarpLanes,
                               thread_id() / kWarpLanes,
                               1 << params.blocks_log2,
                               block_y(),
                               first_token,
                               left < kFusedTokens ? left : kFusedTokens,
                               0,
                               0};
  block.first_slice = block.first_slice_of(block.rank);
  block.slices = block.first_slice_of(block.rank + 1) - block.first_slice;
  wait_for_previous_kernel();
  let_next_kernel_start();
  block.first_stages();
  sync_blocks(block.blocks);
  block.convert_latents();
  if (block.blocks > 1) {
    sync_block();
    block.share_latents();
  }
  sync_blocks(block.blocks);  // after which no block looks into another, which may then end
  block.last_stage();
}

// Blocks are [1, blocks of a cluster, tiles of tokens].
template <typename Operand>
LB2_KERNEL(kThreads, 1)
fused(const LB2_GRID_CONSTANT FusedParams params) {
  fused_block<Operand>(params);
}

}  // namespace lb2::cuda
