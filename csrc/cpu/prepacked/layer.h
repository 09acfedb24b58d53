// The tasks of one prepacked layer in a block of tokens; forward.cpp and mlp.cpp make calls of them.
#pragma once

#include "cpu/prepacked/plan.h"

namespace lb2::cpu {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Piece `index` of `count` near-equal pieces of [0, size).
inline Range piece(int64_t size, int64_t index, int64_t count) {
  return {size * index / count, size * (index + 1) / count};
}

// Tokens of a task of a block.
inline Range token_piece(const CallPlan& plan, int64_t tokens, int64_t task) {
  const Range units = piece(divide_up(tokens, plan.token_unit), task % plan.token_tasks, plan.token_tasks);
  return {std::min(tokens, units.begin * plan.token_unit), std::min(tokens, units.end * plan.token_unit)};
}

// A layer whose bytes were read.
struct Layer {
  const char* data;
  Layout layout;
  const float* bias;
};

// Rows of activations, from the first token of a block on.
struct Source {
  const char* rows;
  int64_t stride;  // elements
  lb2_dtype dtype;
  const lb2_norm* norm;  // or NULL
  const float* factors;  // of the norm, one per token
};

// One worker's scratch memory.
struct Scratch {
  float *operand, *dots, *sums, *gate;
  char* tables;
  Scratch(char* workspace, const CallPlan& plan, int64_t worker) {
    char* start = workspace + plan.worker_start + worker * plan.worker_bytes;
    operand = reinterpret_cast<float*>(start);
    tables = start + plan.worker_tables;
    dots = reinterpret_cast<float*>(start + plan.worker_dots);
    sums = reinterpret_cast<float*>(start + plan.worker_sums);
    gate = reinterpret_cast<float*>(start + plan.worker_gate);
  }
};

struct LayerTasks {
  const Layer& layer;
  const LayerPlan& plan;
  const CallPlan& call;
  const LookupKernels& kernels;
  const LookupMode& mode;
  Source source;
  char* workspace;
  int64_t tokens;  // of this block

  const Layout& layout() const { return layer.layout; }
  int64_t output_tiles() const { return divide_up(divide_up(layout().n, kBlockRows), kTileBlocks); }

  // Tasks of the first stages: a segment of columns of one, for a range of its rows and tokens.
  int64_t stage_tasks() const;
  void run_stage(int64_t task, const Scratch& scratch) const;

  // Tasks of the outputs: rows of some tiles and tokens.
  int64_t output_tasks() const { return plan.row_splits * call.token_tasks; }
  Range output_range(int64_t task) const {
    return piece(output_tiles(), task / call.token_tasks, plan.row_splits);
  }

  // The sum over paths and the bias, for the rows of some tiles: row 0 of tile tiles.begin of token t goes to
  // sums + (t - range.begin) * (rows in these tiles).
  void sum_outputs(Range tiles, Range range, const Scratch& scratch, float* sums) const;

 private:
  bool binarized() const { return &mode == &kernels.sign; }
  const float* scale(int64_t offset) const { return reinterpret_cast<const float*>(layer.data + offset); }
  float* part(int stage, int64_t segment, int64_t token) const;
  void load_input(int stage, int64_t token, int64_t first, int64_t columns, int64_t padded, float* out) const;
  void load_latent(const PathLayout& path, int64_t token, int64_t first, int64_t columns, int64_t padded,
                   float* out) const;
  template <typename Load>
  void sum_chunk(const Scratch& scratch, const Matrix& m, int64_t chunk, Range tiles, Range range,
                 const Load& load, float* out, int64_t stride, bool add) const;
  template <typename Load>
  float mean_magnitude(const Scratch& scratch, const Matrix& m, const Load& load) const;
};

}  // namespace lb2::cpu
