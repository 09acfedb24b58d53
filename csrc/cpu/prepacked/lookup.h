// Lookup kernels over prepacked signs: what one instruction set provides, and the arithmetic they all share.
//
// A word holds 15 signs of one row as three groups of 5 (bit 5 g + j: column 5 g + j of the word, 1 is -1).
// Five columns have 32 signed sums, tabulated once per call and token and then looked up by every row: one
// lookup and one add for 5 columns, and no reduction across lanes, as a lane is a row. 32 rows make a block,
// whose order word.h defines.
//
// Arithmetic contract, which makes results the same bits on every instruction set and independent of tiling,
// thread count and batch. Columns are split into chunks (layout.h), each summed by itself:
//  exact: entry e of group z0..z4 is ((((s0 z0 + s1 z1) + s2 z2) + s3 z3) + s4 z4), s_j = -1 if bit j of e
//         else 1; a row adds the entries of the chunk's groups in order. All in fp32.
//  int16: m_l = max over windows of two words (w, w + 1) of |z[15 w + l]| + |z[15 w + 15 + l]|, l < 15, and
//         bound b = their sum as a tree (l with l + 8, l + 4, l + 2, l + 1; lane 15 is 0), which no signed
//         window sum exceeds. Entry e is rne of that of y = z * (32760 / b).
//         Rows add entries as integers, windows in 16 bits, the chunk in 32. Times b * (1 / 32760) in fp32.
//  int8:  y = rne(z * (127 / max|z|)); then as int16, exactly. Times max|z| * (1 / 127).
//  sign:  the integer count of matches minus mismatches with the signs of z (0 counts as +1), times a scale.
// A chunk whose bound is not finite gets a scale that is not, and so do its results.
#pragma once

#include <cstdint>

#include "littlebit2/littlebit2.h"

namespace lb2::cpu {

constexpr int64_t kGroupCols = 5;
constexpr int64_t kTableEntries = 32;
constexpr int64_t kWordGroups = 3;
constexpr int64_t kWordCols = kGroupCols * kWordGroups;
constexpr int64_t kWindowWords = 2;  // summed in 16 bits
constexpr int64_t kBlockRows = 32;
constexpr int64_t kBlockBytes = kBlockRows * 2;  // of one word
constexpr int64_t kTileBlocks = 4;               // blocks that are interleaved word by word
constexpr int64_t kChunkWords = 48;              // at most, in a chunk; an even number
constexpr int64_t kChunkCols = kChunkWords * kWordCols;
constexpr int64_t kOperandCols = (kChunkCols + 15) / 16 * 16;  // floats of a chunk's operand buffer
constexpr float kInt16Limit = 32760.0f;                        // leaves room for the rounding of a window
constexpr float kInt8Limit = 127.0f;
constexpr float kLeastBound = 0x1p-110f;  // below, 16-bit entries lose precision instead of overflowing
constexpr int64_t kExactTableBytes = kWordGroups * kTableEntries * 4;  // of a word
constexpr int64_t kInt16TableBytes = kWordGroups * kTableEntries * 2;
constexpr int64_t kSignTableBytes = 2;
constexpr int64_t kTileConfigBytes = 64;

// One tile of prepacked signs: word w of block b lies at data + (w * blocks + b) * kBlockBytes.
struct SignTile {
  const char* data;
  int64_t words;   // even
  int64_t blocks;  // 1 .. kTileBlocks
};

// Tables of some tokens for one chunk; token t's start at data + t * stride.
struct Tables {
  const char* data;
  int64_t stride;       // bytes
  const float* scales;  // one per token; unused by exact and sign
  int64_t tokens;
  int64_t columns;  // of the chunk, pad columns not counted
};

// Sums of a tile's rows: row r of token t at data[t * stride + r].
struct RowSums {
  float* data;
  int64_t stride;
  bool add;  // to what is there, or overwrite
};

// How activations enter the sums: the columns of lb2_activation without AUTO.
struct LookupMode {
  int64_t table_bytes;  // of one word
  int64_t tokens;       // that sums() takes at once, at most
  // Fills the tables of `words` words and returns their scale. z: words * kWordCols columns, zero past the
  // operand's end, readable 16 floats further; scratch.
  float (*build)(float* z, int64_t words, char* tables);
  void (*sums)(const SignTile& tile, const Tables& tables, const RowSums& out);
  // Of modes on tiles (tiles/kernels.h): planes of bytes of an operand, and what every thread calls before
  // sums() and afterwards. `saved` has kTileConfigBytes.
  int64_t planes = 0;
  void (*enter)(char* saved) = nullptr;
  void (*leave)(const char* saved) = nullptr;

  // Bytes of the tables of one token.
  constexpr int64_t token_bytes(int64_t words) const {
    return planes == 0 ? words * table_bytes : ((words + 3) / 4 + 1) * 64 * planes;
  }
};

struct LookupKernels {
  LookupMode exact, int16, int8, sign;
  // out[i] = float(in[i]) * scale[i] for i < n and 0 up to `padded`, a multiple of 16. As
  // Kernels::load_scaled.
  void (*load_scaled)(lb2_dtype dtype, const void* in, const float* scale, int64_t n, int64_t padded,
                      float* out);
  // out[i] = (parts[0][i] + parts[1][i] + ...) * scale[i] for i < n and 0 up to `padded`.
  void (*load_latents)(const float* parts, int64_t part_stride, int64_t num_parts, const float* scale,
                       int64_t n, int64_t padded, float* out);
  // sum |z[i]|, for the scale of sign: 16 lanes, then a tree (i with i + 8, i + 4, i + 2, i + 1).
  float (*abs_sum)(const float* z, int64_t padded);
  // sums[i] = (dots[i] * factor) * scale[i] + (add ? sums[i] : 0), each step rounded.
  void (*scale_rows)(const float* dots, const float* scale, float factor, int64_t n, bool add, float* sums);
  void (*add_bias)(const float* bias, int64_t n, float* sums);
  // What surrounds the layers of a call (isa/fused_body.h).
  // sum float(in[i])^2 over i < n, in the order of abs_sum with four vectors in turn.
  float (*sum_squares)(lb2_dtype dtype, const void* in, int64_t n);
  // out[i] *= factor * (float(weight[i]) + offset) for i < n. `out` is writable up to a multiple of 16.
  void (*scale_norm)(lb2_dtype dtype, const void* weight, float offset, float factor, int64_t n, float* out);
  // out[i] = f(gate[i]) * up[i], or f(gate[i]) if up is NULL. All three can be accessed up to the next
  // multiple of 16 from `n`.
  void (*activate)(lb2_function function, const float* gate, const float* up, int64_t n, float* out);
  // sums[i] += float(residual[i]).
  void (*add_residual)(lb2_dtype dtype, const void* residual, int64_t n, float* sums);
  void (*store)(lb2_dtype dtype, const float* in, int64_t n, void* out);
  int64_t macs_per_worker;  // below this much work, waking another thread costs more than it saves
};

// Each defined by its isa/kernels_<isa>.cpp, where that is built.
extern const LookupKernels kScalarLookup, kAvx2Lookup, kAvx512Lookup, kAvx512VnniLookup, kNeonLookup;

}  // namespace lb2::cpu
