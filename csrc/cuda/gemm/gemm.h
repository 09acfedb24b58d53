// The GEMM: signs [rows, cols] times the converted activations of many tokens.
//
// A block computes a tile of rows and tokens over all slices of its terms, in order. cp.async brings
// activations, words and scales into shared memory, three stages ahead of the MMAs; words are expanded to
// signs in registers. The tensor core sums a slice, exactly in int8; that sum times its scales is added, in
// the order of slices, to a second set of fp32 sums. In the first of two stages the slices may be split over
// several blocks, whose sums the next conversion adds in the same order. So the bits of a token's result
// depend neither on the tile, nor on the split, nor on the other tokens.
#pragma once

#include "cuda/gemm/convert.h"
#include "cuda/gemm/multiply.h"

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

// The group of a block, and its slices, of all terms one after another.
struct GemmItems {
  int group;
  int term, slice;  // the first ones
  int count;        // of slices
};

LB2_DEVICE GemmItems gemm_items(const LaunchParams& params) {
  int index = 0;
  while (index + 1 < params.num_groups && params.groups[index + 1].first_tile <= block_x()) ++index;
  const Group& group = params.groups[index];
  GemmItems items = {index, group.first_term, 0, 0};
  if (params.splits > 1) {
    const int64_t slices = params.terms[items.term].slices;
    items.slice = static_cast<int>(slices * block_y() / params.splits);
    items.count = static_cast<int>(slices * (block_y() + 1) / params.splits) - items.slice;
  } else {
    for (int i = group.first_term; i < group.last_term; ++i) items.count += params.terms[i].slices;
  }
  return items;
}

// A walk over the stages of a block: of activations, and at the first stage of a slice also of its signs.
struct GemmCursor {
  int term, slice, stage;
};

template <typename Operand, typename Shape>
struct GemmBlock {
  static constexpr lb2_activation kActivation = Operand::kActivation;
  static constexpr int kQuarters = Operand::kQuarters, kTerms = Operand::kTerms;
  static constexpr int kStepBytes = gemm_step_bytes(kActivation);
  static constexpr int kStageSteps = gemm_stage_steps(kActivation, Shape::kTokens);
  static constexpr int kSliceStages = gemm_slice_stages(kActivation, Shape::kTokens);
  static constexpr int kLeastStages = gemm_least_stages(kActivation, Shape::kTokens);
  static constexpr int kSlots = gemm_slice_slots(kActivation, Shape::kTokens);
  static constexpr int kRunBytes = kStageSteps * kStepBytes;  // of a group in a stage
  static constexpr int kIndexWords = gemm_index_words(Shape::kRows);
  static constexpr int kSignBytes = 4 * kIndexWords * 4;
  static constexpr int kSlotBytes = gemm_slot_bytes(Shape::kRows, Shape::kTokens);
  static constexpr int kAhead = kPipelineStages - 1;
  static constexpr int kBlockBytes = Operand::kBlockBytes;
  static constexpr int kRowTiles = Shape::kRowTiles, kColumnTiles = Shape::kColumnTiles;
  using Sum = typename Operand::Sum;

  const LaunchParams& params;
  unsigned char* stages;  // [kPipelineStages][kStageBytes], less where a block has fewer
  unsigned char* slots;   // [kSlots][kSlotBytes]
  int rows, tile_row;     // rows of the group, and the block's first
  int token_groups;

  LB2_DEVICE static int slice_steps(const Term& term, int slice) {
    return slice_indices(term.cols, slice) * kQuarters;
  }
  LB2_DEVICE static int slice_stages(const Term& term, int slice) {
    const int needed = (slice_steps(term, slice) + kStageSteps - 1) / kStageSteps;
    return needed < kLeastStages ? kLeastStages : needed;
  }

  LB2_DEVICE void advance(GemmCursor& at) const {
    const Term& term = params.terms[at.term];
    if (++at.stage < slice_stages(term, at.slice)) return;
    at.stage = 0;
    if (++at.slice < term.slices) return;
    at.slice = 0;
    ++at.term;
  }

  // Words of a slice at its first stage, zero past the ends of rows and past the last row: index i of lane t
  // is word 4 i + t.
  LB2_DEVICE void copy_signs(const GemmCursor& at, int slot) const {
    if (at.stage != 0) return;
    const Term& term = params.terms[at.term];
    const int row_words = (term.cols + LB2_WORD_BITS - 1) / LB2_WORD_BITS;
    // A thread has one word of every sixteenth row.
    constexpr int kRowStep = kThreads / kSliceWords;
    const int word = thread_id() % kSliceWords, row = thread_id() / kSliceWords;
    uint32_t* target =
        reinterpret_cast<uint32_t*>(slots + slot * kSlotBytes) + word / 4 * kIndexWords + row * 4 + word % 4;
    const bool in_row = at.slice * kSliceWords + word < row_words;
    const int rows_left = in_row ? rows - tile_row - row : 0;
    const uint32_t* source = term.words;
    if (rows_left > 0) source += (tile_row + row) * term.word_stride + at.slice * kSliceWords + word;
#pragma unroll
    for (int i = 0; i < Shape::kRows / kRowStep; ++i) {
      const bool inside = i * kRowStep < rows_left;
      copy_word(target + i * kRowStep * 4, source, inside);
      if (i * kRowStep + kRowStep < rows_left) source += kRowStep * term.word_stride;
    }
  }

  LB2_DEVICE void copy_activations(const GemmCursor& at, int ring, int slot, int first_group) const {
    const Term& term = params.terms[at.term];
    const int64_t group_stride = static_cast<int64_t>(term.slices) * kBlockBytes;
    const unsigned char* source = converted_block<Operand>(term, first_group, at.slice);
    unsigned char* target = stages + ring * kStageBytes;
#pragma unroll
    for (int i = 0; i < kStageBytes / 16 / kThreads; ++i) {
      const int byte = (thread_id() + i * kThreads) * 16, group = byte / kRunBytes;
      // Groups past the last one are not there, and their sums not stored.
      if (group < token_groups)
        copy_words4(target + byte, source + group * group_stride + at.stage * kRunBytes + byte % kRunBytes);
    }
    if (at.stage != 0 || thread_id() >= token_groups * (kGemmTailBytes / 16)) return;
    const int group = thread_id() / (kGemmTailBytes / 16), byte = thread_id() % (kGemmTailBytes / 16) * 16;
    copy_words4(slots + slot * kSlotBytes + kSignBytes + group * kGemmTailBytes + byte,
                source + group * group_stride + kBlockBytes - kGemmTailBytes + byte);
  }

  // Adds the products of one stage, of as many steps as the slice has left.
  LB2_DEVICE void multiply(int stage, int steps, int ring, int slot, int row_warp, int token_warp, int lane,
                           Sum (&sums)[kRowTiles][kColumnTiles][4]) const {
    const uint32_t* signs = reinterpret_cast<const uint32_t*>(slots + slot * kSlotBytes);
    const unsigned char* data =
        stages + ring * kStageBytes + token_warp * kColumnTiles * kRunBytes + lane * 16;
    // As much as one word of a lane has of the stage: unrolled no further, for the sake of registers.
    constexpr int kWordSteps = kStageSteps < kQuarters ? kStageSteps : kQuarters;
#pragma unroll 1
    for (int first = 0; first < kStageSteps && first < steps; first += kWordSteps) {
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
      for (int step = 0; step < kWordSteps; ++step)
        multiply_step<Operand, kRowTiles, kColumnTiles>(words, step, data + (first + step) * kStepBytes,
                                                        kRunBytes, sums);
    }
  }
};

// The block's sums, [tokens][rows] in shared memory, to memory: rows lie side by side there.
template <typename Shape>
LB2_DEVICE void store_tile(const LaunchParams& params, const Group& group, const float* sums, int tile_row,
                           int first_token) {
  constexpr int kQuads = Shape::kRows / 4, kPitch = Shape::kSumPitch;
  const int left = params.m - first_token, tokens = left < Shape::kTokens ? left : Shape::kTokens;
  const int64_t stride = group.output_stride;
  const bool wide = is_wide(group, params.output_dtype);
  for (int item = thread_id(); item < tokens * kQuads; item += kThreads) {
    const int token = item / kQuads, quad = item % kQuads, row = tile_row + quad * 4;
    if (row >= group.rows) continue;
    store_sums(group, params.output_dtype, (first_token + token) * stride + row, row,
               load_words4(sums + token * kPitch + quad * 4), wide);
  }
}

template <typename Operand, typename Shape>
LB2_DEVICE void gemm_block(const LaunchParams& params) {
  using Block = GemmBlock<Operand, Shape>;
  using Sum = typename Operand::Sum;
  constexpr int kRowTiles = Shape::kRowTiles, kColumnTiles = Shape::kColumnTiles;
  constexpr int kSliceStages = Block::kSliceStages, kAhead = Block::kAhead, kSlots = Block::kSlots;
  const int lane = thread_id() % kWarpLanes, warp = thread_id() / kWarpLanes;
  const int row_warp = warp % Shape::kRowWarps, token_warp = warp / Shape::kRowWarps;
  const int first_token = block_z() * Shape::kTokens, first_group = block_z() * Shape::kGroups;
  unsigned char* shared = shared_memory();

  const GemmItems items = gemm_items(params);
  const Group& group = params.groups[items.group];
  const int tile_row = (block_x() - group.first_tile) * Shape::kRows;
  int num_stages = 0;
  for (int i = items.term, slice = items.slice, rest = items.count; rest > 0; ++i, slice = 0) {
    const Term& term = params.terms[i];
    const int count = term.slices - slice < rest ? term.slices - slice : rest;
    num_stages += (count - 1) * kSliceStages + Block::slice_stages(term, slice + count - 1);
    rest -= count;
  }
  const int ring_stages = num_stages < kPipelineStages ? num_stages : kPipelineStages;
  const int left = (params.m - first_token + kGroupTokens - 1) / kGroupTokens;
  const Block block = {params,     shared,   shared + ring_stages * kStageBytes,
                       group.rows, tile_row, left < Shape::kGroups ? left : Shape::kGroups};

  // Signs are older than the kernel before this one, which is the conversion.
  GemmCursor ahead = {items.term, items.slice, 0};
  int ahead_slot = 0;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i >= num_stages) break;
    block.copy_signs(ahead, ahead_slot);
    block.advance(ahead);
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
      block.advance(ahead);
      if (ahead.stage == 0) ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
    }
    commit_copies();
  }

  float total[kRowTiles][kColumnTiles][4];
  set_zero(total);
  // Of the lane's first sum: rows 8 and 16 further follow, columns 1 and 8 further.
  const int first_row = tile_row + row_warp * kRowTiles * kTileRows + lane / 4;
  const int first_column = first_token + token_warp * kColumnTiles * kGroupTokens + lane % 4 * 2;
  int ring = 0, ahead_ring = kAhead, slot = 0, copied = kAhead;
  GemmCursor at = {items.term, items.slice, 0};
  for (int item = 0; item < items.count; ++item) {
    const Term& term = params.terms[at.term];
    const int steps = Block::slice_steps(term, at.slice), stages = Block::slice_stages(term, at.slice);
    float row_scale[kRowTiles][2];
#pragma unroll
    for (int row = 0; row < kRowTiles; ++row)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at_row = first_row + row * kTileRows + 8 * half;
        row_scale[row][half] =
            term.row_scale != nullptr && at_row < group.rows ? term.row_scale[at_row] : 1.0f;
      }
    Sum sums[kRowTiles][kColumnTiles][4];
    float chains[kRowTiles][kColumnTiles][4];  // of a slice, where the tensor core's are shorter
    set_zero(sums);
    set_zero(chains);
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      wait_for_copy_groups<kAhead - 1>();
      sync_block();  // the stage is there for all, and the one before it has been used up
      if (copied < num_stages) {
        block.copy_signs(ahead, ahead_slot);
        block.copy_activations(ahead, ahead_ring, ahead_slot, first_group);
        block.advance(ahead);
        if (ahead.stage == 0) ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
        ahead_ring = ahead_ring + 1 == kPipelineStages ? 0 : ahead_ring + 1;
        ++copied;
      }
      commit_copies();
      block.multiply(stage, steps - stage * Block::kStageSteps, ring, slot, row_warp, token_warp, lane, sums);
      ring = ring + 1 == kPipelineStages ? 0 : ring + 1;
      if constexpr (Operand::kShortChains) {
        static_assert(Block::kStageSteps <= Block::kQuarters, "a stage holds the end of one chain at most");
        if ((stage + 1) * Block::kStageSteps % Block::kQuarters == 0) end_chains(sums, chains);
      }
    }
    // The slice's sum times its scales.
    const unsigned char* tails = block.slots + slot * Block::kSlotBytes + Block::kSignBytes +
                                 token_warp * kColumnTiles * kGemmTailBytes + lane % 4 * 8;
    add_slice<Operand, kRowTiles, kColumnTiles>(tails, row_scale, sums, chains, total);
    if (params.splits > 1) {
      float* part = static_cast<float*>(group.output) +
                    static_cast<int64_t>(at.slice) * params.m * group.rows +
                    static_cast<int64_t>(first_column) * group.rows + first_row;
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = tile * kGroupTokens + i;
          float* sums_of_token = part + token * static_cast<int64_t>(group.rows);
          const bool there = first_column + token < params.m;
#pragma unroll
          for (int row = 0; row < 2 * kRowTiles; ++row) {
            float& sum = total[row / 2][tile][row % 2 * 2 + i];
            if (there && first_row + 8 * row < group.rows) sums_of_token[8 * row] = sum;
            sum = 0.0f;
          }
        }
    }
    at.stage = stages - 1;
    block.advance(at);
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }

  wait_for_copies();
  if (params.splits > 1) return;
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
  store_tile<Shape>(params, group, tile_sums, tile_row, first_token);
}

// Two blocks on an SM where sums leave the registers for it.
template <typename Operand, typename Shape>
LB2_KERNEL(kThreads, Shape::kRowTiles* Shape::kColumnTiles * 4 * (Operand::kShortChains ? 3 : 2) < 48 ? 2 : 1)
gemm(const LB2_GRID_CONSTANT LaunchParams params) {
  gemm_block<Operand, Shape>(params);
}

}  // namespace lb2::cuda
