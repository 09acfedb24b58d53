// The GEMM: signs [rows, cols] times the converted activations of many tokens.
//
// A block owns a tile of rows and tokens, and the slices of its terms one after another. Activations, words
// and scales come into shared memory by cp.async, three stages ahead of the MMAs; words become signs in
// registers. The sum of a slice is the tensor core's, exact in int8; times its scales it is added, in the
// order of slices, to a second set of sums, in fp32. In the first of two stages slices may be cut into blocks
// of their own, whose sums the next conversion adds in the same order: a token's bits depend neither on the
// tile, nor on the split, nor on the other tokens.
#pragma once

#include "cuda/gemm_convert.h"

namespace lb2::cuda {

// Warps of a block are kRowWarps x kTokenWarps.
template <int kRows_, int kTokens_>
struct GemmShape {
  static constexpr int kRows = kRows_, kTokens = kTokens_;
  static constexpr int kGroups = kTokens / kGroupTokens;
  static constexpr int kRowWarps = kTokens == 128 ? 2 : 4;
  static constexpr int kTokenWarps = kWarps / kRowWarps;
  static constexpr int kRowTiles = kRows / kRowWarps / kTileRows;  // MMAs of a warp
  static constexpr int kColumnTiles = kGroups / kTokenWarps;
  static constexpr int kSumPitch = gemm_sum_pitch(kRows);
};

// The slices of a block, of all its terms one after another.
struct GemmItems {
  int term, last_term;  // the terms of the block
  int slice;            // of the first term
  int count;
};

LB2_DEVICE GemmItems gemm_items(const GemmParams& params) {
  GemmItems items = {0, params.num_terms, 0, 0};
  if (params.alone) {
    while (items.term + 1 < params.num_terms && params.terms[items.term + 1].first_tile <= block_x())
      ++items.term;
    items.last_term = items.term + 1;
    items.slice = params.split ? block_y() : 0;
    items.count = params.split ? 1 : params.terms[items.term].slices;
  } else {
    for (int i = 0; i < params.num_terms; ++i) items.count += params.terms[i].slices;
  }
  return items;
}

// A walk over the stages of a block: of activations, and at the first stage of a slice also of its signs.
template <int kSliceStages>
struct GemmCursor {
  int term, slice, stage;
  LB2_DEVICE void advance(const GemmParams& params) {
    if (++stage < kSliceStages) return;
    stage = 0;
    if (++slice < params.terms[term].slices) return;
    slice = 0;
    ++term;
  }
};

template <typename Operand, typename Shape>
struct GemmBlock {
  static constexpr lb2_activation kActivation = Operand::kActivation;
  static constexpr int kQuarters = Operand::kQuarters, kTerms = Operand::kTerms;
  static constexpr int kStepBytes = gemm_step_bytes(kActivation);
  static constexpr int kStageSteps = gemm_stage_steps(kActivation, Shape::kTokens);
  static constexpr int kSliceStages = gemm_slice_stages(kActivation, Shape::kTokens);
  static constexpr int kSlots = gemm_slice_slots(kActivation, Shape::kTokens);
  static constexpr int kRunBytes = kStageSteps * kStepBytes;  // of a group in a stage
  static constexpr int kIndexWords = gemm_index_words(Shape::kRows);
  static constexpr int kSignBytes = 4 * kIndexWords * 4;
  static constexpr int kSlotBytes = gemm_slot_bytes(Shape::kRows, Shape::kTokens);
  static constexpr int kAhead = kPipelineStages - 1;
  static constexpr int kBlockBytes = Operand::kBlockBytes;
  static constexpr int kRowTiles = Shape::kRowTiles, kColumnTiles = Shape::kColumnTiles;
  using Cursor = GemmCursor<kSliceStages>;
  using Sum = typename Operand::Sum;

  const GemmParams& params;
  unsigned char* stages;  // [kPipelineStages][kStageBytes], less where a block has fewer
  unsigned char* slots;   // [kSlots][kSlotBytes]
  int tile_row, groups;

  // Words of the first stage of a slice, zero past the ends of rows and past the last row: index i of lane t
  // is word 4 t + i of the slice.
  LB2_DEVICE void copy_signs(const Cursor& at, int slot) const {
    if (at.stage != 0) return;
    const GemmTerm& term = params.terms[at.term];
    const int row_words = (term.cols + LB2_WORD_BITS - 1) / LB2_WORD_BITS;
    uint32_t* target = reinterpret_cast<uint32_t*>(slots + slot * kSlotBytes);
#pragma unroll
    for (int i = 0; i < Shape::kRows * kSliceWords / kThreads; ++i) {
      const int item = thread_id() + i * kThreads, row = item / kSliceWords, word = item % kSliceWords;
      const bool inside = tile_row + row < term.rows && at.slice * kSliceWords + word < row_words;
      const int64_t offset = (tile_row + row) * term.word_stride + at.slice * kSliceWords + word;
      const uint32_t* source = term.words + (inside ? offset : 0);
      copy_word(target + word % 4 * kIndexWords + row * 4 + word / 4, source, inside);
    }
  }

  LB2_DEVICE void copy_activations(const Cursor& at, int ring, int slot, int first_group) const {
    const GemmTerm& term = params.terms[at.term];
    const int64_t group_stride = static_cast<int64_t>(term.slices) * kBlockBytes;
    const unsigned char* source = converted_block<Operand>(term, first_group, at.slice);
    unsigned char* target = stages + ring * kStageBytes;
#pragma unroll
    for (int i = 0; i < kStageBytes / 16 / kThreads; ++i) {
      const int byte = (thread_id() + i * kThreads) * 16, group = byte / kRunBytes;
      // Groups past the last one are not there, and their sums not stored.
      if (group < groups)
        copy_words4(target + byte, source + group * group_stride + at.stage * kRunBytes + byte % kRunBytes);
    }
    if (at.stage != 0 || thread_id() >= groups * (kGemmTailBytes / 16)) return;
    const int group = thread_id() / (kGemmTailBytes / 16), byte = thread_id() % (kGemmTailBytes / 16) * 16;
    copy_words4(slots + slot * kSlotBytes + kSignBytes + group * kGemmTailBytes + byte,
                source + group * group_stride + kBlockBytes - kGemmTailBytes + byte);
  }

  // Adds the products of one stage.
  LB2_DEVICE void multiply(int stage, int ring, int slot, int row_warp, int token_warp, int lane,
                           Sum (&sums)[kRowTiles][kColumnTiles][4]) const {
    const uint32_t* signs = reinterpret_cast<const uint32_t*>(slots + slot * kSlotBytes);
    const unsigned char* data =
        stages + ring * kStageBytes + token_warp * kColumnTiles * kRunBytes + lane * 16;
    // As much as one word of a lane has of the stage: unrolled no further, for the sake of registers.
    constexpr int kWordSteps = kStageSteps < kQuarters ? kStageSteps : kQuarters;
#pragma unroll 1
    for (int first = 0; first < kStageSteps; first += kWordSteps) {
      const int index = (stage * kStageSteps + first) / kQuarters;
      // Where a stage is less than a word: the bits that it begins with first.
      const int shift = kStageSteps < kQuarters ? stage * kStageSteps % kQuarters * 4 : 0;
      uint32_t words[kRowTiles][2];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          words[tile][half] =
              signs[index * kIndexWords + (row_warp * kRowTiles + tile) * kTileRows * 4 + half * 32 + lane] >>
              shift;
#pragma unroll
      for (int step = 0; step < kWordSteps; ++step) {
        uint32_t a[2][kRowTiles][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
            for (int j = 0; j < 4; ++j)
              a[i][tile][j] = Operand::expand(words[tile][j % 2], step * 4 + 2 * i + j / 2);
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          Words4 b[kColumnTiles];
#pragma unroll
          for (int tile = 0; tile < kColumnTiles; ++tile)
            b[tile] =
                load_words4(data + tile * kRunBytes + (first + step) * kStepBytes + term * kWarpLanes * 16);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int row = 0; row < kRowTiles; ++row)
#pragma unroll
              for (int tile = 0; tile < kColumnTiles; ++tile) {
                const uint32_t pair[2] = {b[tile].w[2 * i], b[tile].w[2 * i + 1]};
                Operand::multiply(sums[row][tile], a[i][row], pair);
              }
        }
      }
    }
  }
};

// One output, bias included.
LB2_DEVICE void store_sums(const GemmParams& params, void* output, int64_t at, int row, int rows,
                           const Words4& sums, bool wide) {
  const lb2_dtype dtype = params.output_dtype;
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = bits_float(sums.w[i]);
    if (params.bias != nullptr && row + i < rows) values[i] += params.bias[row + i];
  }
  if (dtype == LB2_FLOAT32) {
    float* target = static_cast<float*>(output) + at;
    if (wide && row + 4 <= rows) {
      Words4 words;
#pragma unroll
      for (int i = 0; i < 4; ++i) words.w[i] = float_bits(values[i]);
      *reinterpret_cast<Words4*>(target) = words;
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row + i < rows) target[i] = values[i];
    return;
  }
  uint16_t halves[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    halves[i] = dtype == LB2_FLOAT16 ? float_to_half(values[i]) : float_to_bfloat(values[i]);
  uint16_t* target = static_cast<uint16_t*>(output) + at;
  if (wide && row + 4 <= rows) {
    struct alignas(8) Words2 {
      uint32_t w[2];
    };
    *reinterpret_cast<Words2*>(target) = {{halves[0] | static_cast<uint32_t>(halves[1]) << 16,
                                           halves[2] | static_cast<uint32_t>(halves[3]) << 16}};
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row + i < rows) target[i] = halves[i];
}

// The block's sums, [tokens][rows] in shared memory, to memory: rows lie side by side there.
template <typename Shape>
LB2_DEVICE void store_tile(const GemmParams& params, const GemmTerm& term, const float* sums, int tile_row,
                           int first_token) {
  constexpr int kQuads = Shape::kRows / 4, kPitch = Shape::kSumPitch;
  const int left = params.m - first_token, tokens = left < Shape::kTokens ? left : Shape::kTokens;
  void* output = params.output;
  int64_t stride = params.output_stride;
  if (params.alone) {
    output = term.sums + static_cast<int64_t>(block_y()) * params.m * term.rows;
    stride = term.rows;
  }
  const int element_bytes = params.output_dtype == LB2_FLOAT32 ? 4 : 2;
  const bool wide = (reinterpret_cast<uintptr_t>(output) % (4 * element_bytes)) == 0 && (stride & 3) == 0;
  for (int item = thread_id(); item < tokens * kQuads; item += kThreads) {
    const int token = item / kQuads, quad = item % kQuads, row = tile_row + quad * 4;
    if (row >= term.rows) continue;
    store_sums(params, output, (first_token + token) * stride + row, row, term.rows,
               load_words4(sums + token * kPitch + quad * 4), wide);
  }
}

template <typename Operand, typename Shape>
LB2_DEVICE void gemm_block(const GemmParams& params) {
  using Block = GemmBlock<Operand, Shape>;
  using Cursor = typename Block::Cursor;
  using Sum = typename Operand::Sum;
  constexpr int kRowTiles = Shape::kRowTiles, kColumnTiles = Shape::kColumnTiles;
  constexpr int kSliceStages = Block::kSliceStages, kAhead = Block::kAhead, kSlots = Block::kSlots;
  const int lane = thread_id() % kWarpLanes, warp = thread_id() / kWarpLanes;
  const int row_warp = warp % Shape::kRowWarps, token_warp = warp / Shape::kRowWarps;
  const int first_token = block_z() * Shape::kTokens, first_group = block_z() * Shape::kGroups;
  unsigned char* shared = shared_memory();

  const GemmItems items = gemm_items(params);
  const GemmTerm& first_term = params.terms[items.term];
  const int tile_row = (block_x() - (params.alone ? first_term.first_tile : 0)) * Shape::kRows;
  const int num_stages = items.count * kSliceStages;
  const int ring_stages = num_stages < kPipelineStages ? num_stages : kPipelineStages;
  const int left = (params.m - first_token + kGroupTokens - 1) / kGroupTokens;
  const Block block = {params, shared, shared + ring_stages * kStageBytes, tile_row,
                       left < Shape::kGroups ? left : Shape::kGroups};

  // Signs are older than the kernel before this one, which is the conversion.
  Cursor ahead = {items.term, items.slice, 0};
  int ahead_slot = 0;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i >= num_stages) break;
    block.copy_signs(ahead, ahead_slot);
    ahead.advance(params);
    if (ahead.stage == 0) ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  ahead = {items.term, items.slice, 0};
  ahead_slot = 0;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < num_stages) {
      block.copy_activations(ahead, i, ahead_slot, first_group);
      ahead.advance(params);
      if (ahead.stage == 0) ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
    }
    commit_copies();
  }

  float total[kRowTiles][kColumnTiles][4];
#pragma unroll
  for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i)
    total[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] = 0.0f;
  int ring = 0, ahead_ring = kAhead, slot = 0, copied = kAhead;
  Cursor at = {items.term, items.slice, 0};
  for (int item = 0; item < items.count; ++item) {
    Sum sums[kRowTiles][kColumnTiles][4];
    float chains[kRowTiles][kColumnTiles][4];  // of a slice, where the tensor core's are shorter
#pragma unroll
    for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i) {
      sums[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] = Sum{0};
      chains[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] = 0.0f;
    }
#pragma unroll 1
    for (int stage = 0; stage < kSliceStages; ++stage) {
      wait_for_copy_groups<kAhead - 1>();
      sync_block();  // the stage is there for all, and the one before it has been used up
      if (copied < num_stages) {
        block.copy_signs(ahead, ahead_slot);
        block.copy_activations(ahead, ahead_ring, ahead_slot, first_group);
        ahead.advance(params);
        if (ahead.stage == 0) ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
        ahead_ring = ahead_ring + 1 == kPipelineStages ? 0 : ahead_ring + 1;
        ++copied;
      }
      commit_copies();
      block.multiply(stage, ring, slot, row_warp, token_warp, lane, sums);
      ring = ring + 1 == kPipelineStages ? 0 : ring + 1;
      if constexpr (Operand::kShortChains) {
        static_assert(Block::kStageSteps <= Block::kQuarters, "a stage holds the end of one chain at most");
        if ((stage + 1) * Block::kStageSteps % Block::kQuarters == 0) {
#pragma unroll
          for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i) {
            Sum& sum = sums[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4];
            chains[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4] += sum;
            sum = Sum{0};
          }
        }
      }
    }
    // The slice's sum times its scales.
    const GemmTerm& term = params.terms[at.term];
    const unsigned char* tails = block.slots + slot * Block::kSlotBytes + Block::kSignBytes +
                                 token_warp * kColumnTiles * kGemmTailBytes + lane % 4 * 8;
#pragma unroll
    for (int row = 0; row < kRowTiles; ++row) {
      float row_scale[2] = {1.0f, 1.0f};
      if (!params.alone) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at_row = tile_row + (row_warp * kRowTiles + row) * kTileRows + lane / 4 + 8 * half;
          row_scale[half] = at_row < term.rows ? term.row_scale[at_row] : 0.0f;
        }
      }
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        const float* scale = reinterpret_cast<const float*>(tails + tile * kGemmTailBytes);
        const int32_t* all = reinterpret_cast<const int32_t*>(scale) + kGroupTokens;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float sum =
              Operand::kShortChains ? chains[row][tile][i] : Operand::value(sums[row][tile][i], all[i % 2]);
          // Rounded before it is added: a split rounds it there as well.
          total[row][tile][i] += multiply_rounded(scale[i % 2] * row_scale[i / 2], sum);
        }
      }
    }
    at.stage = kSliceStages - 1;
    at.advance(params);
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }

  wait_for_copies();
  sync_block();
  float* tile_sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int row = 0; row < kRowTiles; ++row)
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = (token_warp * kColumnTiles + tile) * kGroupTokens + lane % 4 * 2 + i % 2;
        const int at_row = (row_warp * kRowTiles + row) * kTileRows + lane / 4 + 8 * (i / 2);
        tile_sums[token * Shape::kSumPitch + at_row] = total[row][tile][i];
      }
  sync_block();
  store_tile<Shape>(params, first_term, tile_sums, tile_row, first_token);
}

// Two blocks on an SM where sums leave the registers for it.
template <typename Operand, typename Shape>
LB2_KERNEL(kThreads, Shape::kRowTiles* Shape::kColumnTiles * 4 * (Operand::kShortChains ? 3 : 2) < 48 ? 2 : 1)
gemm(const LB2_GRID_CONSTANT GemmParams params) {
  gemm_block<Operand, Shape>(params);
}

}  // namespace lb2::cuda
