// Converts slices of activations to tensor-core layout: in the shared memory of each block that uses them,
// or, for many tokens, once for all blocks in a separate launch.
#pragma once

#include "cuda/decode/bit_planes.h"
#include "cuda/decode/sign_halves.h"
#include "cuda/extras.h"

namespace lb2::cuda {

// What a slice of a tile of kTokens tokens takes: tiles of the MMA's columns, a scale and a sum per token.
template <typename Mma, int kTokens>
struct SliceLayout {
  static constexpr int kTiles = Mma::template kTiles<kTokens>;
  static constexpr int kScales = kTiles * Mma::kTokensPerTile;
  static constexpr bool kConvertedAhead = converts_ahead(kTokens);
  static constexpr int kBytes = slice_bytes(Mma::kActivation, kTokens);
  static_assert(kScales >= kTokens && kBytes == kTiles * Mma::kTileBytes + (kScales * 8 + 15) / 16 * 16,
                "planning and kernel disagree about a slice");
  LB2_DEVICE static float* scales(unsigned char* slice) {
    return reinterpret_cast<float*>(slice + kTiles * Mma::kTileBytes);
  }
  LB2_DEVICE static const float* scales(const unsigned char* slice) {
    return reinterpret_cast<const float*>(slice + kTiles * Mma::kTileBytes);
  }
};

// A slice of a token, and a lane's columns of it.
struct Conversion {
  SliceSource source;
  int cols[2];
  int valid;  // columns of the slice
};

template <typename Mma>
LB2_DEVICE Conversion conversion_of(const DecodeParams& params, const Term& term, int slice, int token) {
  const int lane = thread_id() % kWarpLanes;
  const int first = slice * kSliceCols, left = term.cols - first, run = first + Mma::first_run(lane);
  return {
      slice_source(params, term, token), {run, run + Mma::kRunPitch}, left < kSliceCols ? left : kSliceCols};
}

// One warp: a slice of token `first_token + token` into that token's columns of `slice_data`. Columns of
// tokens past the last one keep whatever is in them: columns of an MMA do not mix.
template <typename Mma, int kTokens, bool kExtended>
LB2_DEVICE void convert_slice(const DecodeParams& params, const Conversion& work, int first_token, int token,
                              unsigned char* slice_data) {
  using Layout = SliceLayout<Mma, kTokens>;
  float values[kLaneCols];
  load_runs(work.source, work.cols, values);
  if constexpr (kExtended)
    if (params.extras.factor != nullptr)
      multiply_runs(params.extras, first_token + token, work.source.cols, work.cols, values);
  float* scales = Layout::scales(slice_data);
  Mma::stage(values, thread_id() % kWarpLanes, work.valid, token, slice_data, scales + token,
             reinterpret_cast<int32_t*>(scales + Layout::kScales) + token);
}

// Where a launch of convert leaves a slice of a tile of tokens.
template <typename Mma, int kTokens>
LB2_DEVICE unsigned char* converted_slice(const Term& term, int token_tile, int slice) {
  return term.converted +
         (static_cast<int64_t>(token_tile) * term.slices + slice) * SliceLayout<Mma, kTokens>::kBytes;
}

// All slices of all terms, and in an extended kernel the norms of the tokens; blocks are [warps of slices and
// tokens, 1, tiles of tokens].
template <typename Mma, int kTokens, bool kExtended>
LB2_DEVICE void convert_block(const DecodeParams& params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int item = block_x() * kWarps + thread_id() / kWarpLanes;
  const int token = item % kTokens, first_token = block_z() * kTokens;
  if (first_token + token >= params.m) return;
  int slice = item / kTokens;
  for (int i = 0; i < params.num_terms; ++i) {
    const Term& term = params.terms[i];
    if (slice < term.slices) {
      convert_slice<Mma, kTokens, kExtended>(
          params, conversion_of<Mma>(params, term, slice, first_token + token), first_token, token,
          converted_slice<Mma, kTokens>(term, block_z(), slice));
      return;
    }
    slice -= term.slices;
  }
  if constexpr (kExtended) {
    if (slice > 0 || !params.extras.normed) return;
    const Term& term = params.terms[0];
    const int lane = thread_id() % kWarpLanes;
    const float norm = norm_of_row(
        plain_row(term.input, (first_token + token) * term.input_stride, term.cols, params.input_dtype),
        params.extras.eps, lane);
    if (lane == 0) params.extras.norms[first_token + token] = norm;
  }
}

template <typename Mma, int kTokens>
LB2_KERNEL(kThreads, 2)
convert(const LB2_GRID_CONSTANT DecodeParams params) {
  convert_block<Mma, kTokens, false>(params);
}

template <typename Mma, int kTokens>
LB2_KERNEL(kThreads, 2)
convert_extended(const LB2_GRID_CONSTANT DecodeParams params) {
  convert_block<Mma, kTokens, true>(params);
}

}  // namespace lb2::cuda
