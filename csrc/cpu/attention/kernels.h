// The primitives of attention that one instruction set provides, and how the driver sees them.
//
// Arithmetic contract, which makes results bit-identical across instruction sets and independent of thread
// count and batch: keys are split into pieces of kAttentionKeys. A score adds, in lane l of 16, the products
// of elements l, l + 16, ... in order, and then the lanes as a tree (i with i + 8, then i + 4, i + 2, i + 1).
// A piece subtracts its largest score; its weights are added by lane of their key and then as that tree, its
// values in the order of the keys. Pieces are added in order. All of it in fp32, products not rounded before
// they are added.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace lb2::cpu {

constexpr int64_t kAttentionKeys = 128;  // keys of a piece: 32 KiB of 128 16-bit elements stay in L1
constexpr int kAttentionRows = 8;        // rows of queries that share a pass over a piece

// Some rows of queries on a piece of the keys of one head.
struct AttentionPiece {
  lb2_dtype dtype;     // of keys and values
  const char* keys;    // first row, at any address
  int64_t key_stride;  // bytes between rows
  const char* values;
  int64_t value_stride;
  int64_t count;                // keys, 1 .. kAttentionKeys
  int64_t head_size;            // elements of a key
  int64_t value_size;           // elements of a value
  const float* queries;         // [rows, query_stride], scaled, padded with zeros to a multiple of kLanes
  int64_t query_stride;         // elements
  int rows;                     // 1 .. kAttentionRows
  float softcap;                // 0: none
  const float* const* addends;  // for each row what is added to its scores, or nullptr
  float* largest;               // for each row its largest score, `result_stride` apart
  float* sum;                   // the sum of its weights
  float* out;                   // the weighted sum of values, padded_size(value_size) elements
  int64_t result_stride, out_stride;
};

// The results of a row in all pieces.
struct AttentionRow {
  int64_t pieces;
  const float* largest;  // [pieces]
  const float* sum;      // [pieces]
  const float* out;      // [pieces, out_stride]
  int64_t out_stride;
  int64_t value_size;
};

struct AttentionKernels {
  void (*piece)(const AttentionPiece& piece);
  // result[i] = sum of the weighted values / sum of the weights, for i < padded_size(value_size); zeros where
  // all weights are zero.
  void (*combine)(const AttentionRow& row, float* result);
};

// Static, so that no instruction set's code is linked into another's.
static inline int64_t padded_size(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// Each defined by its isa/kernels_<isa>.cpp, where that is built.
extern const AttentionKernels kScalarAttention, kAvx2Attention, kAvx512Attention, kNeonAttention;

}  // namespace lb2::cpu
