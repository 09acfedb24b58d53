// The prepacked CPU layout: a layer in one block of memory. It is not a file format (docs/format.md is). Pure
// functions of the header.
//
//   header | per first stage: in_scale [K], V tiles | per path: out_scale [N], latent_scale [R], U tiles
//
// with every part at a multiple of 64 bytes. First stages with equal in_scale form one matrix, in which each
// V starts at a multiple of 32 rows. A sign matrix is divided into chunks of columns, a chunk into tiles of
// 128 rows (lookup.h). Tiles are stored in that order, so that a pass over the matrix is one stream.
#pragma once

#include <algorithm>

#include "cpu/prepacked/lookup.h"

namespace lb2::cpu {

constexpr int64_t kAlignment = 64;  // of every part, here and in workspaces
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t align(int64_t bytes) { return divide_up(bytes, kAlignment) * kAlignment; }

struct Matrix {
  int64_t rows, cols;
  int64_t blocks;       // of 32 rows
  int64_t words;        // of 15 columns
  int64_t chunk_words;  // of every chunk but the last; even
  int64_t num_chunks;
  int64_t segment_chunks;  // chunks that are summed in order; the sums of segments are then added in order
  int64_t num_segments;
  int64_t offset;  // bytes from the start of the layer

  int64_t tiles() const { return divide_up(blocks, kTileBlocks); }
  int64_t tile_blocks(int64_t tile) const { return std::min(kTileBlocks, blocks - tile * kTileBlocks); }
  int64_t padded_rows() const { return blocks * kBlockRows; }
  int64_t first_column(int64_t chunk) const { return chunk * chunk_words * kWordCols; }
  int64_t columns_of(int64_t chunk) const {
    return std::min(chunk_words * kWordCols, cols - first_column(chunk));
  }
  // Even, as sums are taken two words at a time.
  int64_t words_of(int64_t chunk) const {
    return (std::min(chunk_words, words - chunk * chunk_words) + 1) / 2 * 2;
  }
  int64_t bytes() const {
    return ((num_chunks - 1) * chunk_words + words_of(num_chunks - 1)) * blocks * kBlockBytes;
  }
  int64_t tile_offset(int64_t chunk, int64_t tile) const {
    return offset + (chunk * chunk_words * blocks + tile * kTileBlocks * words_of(chunk)) * kBlockBytes;
  }
};

// Stored at the start of a layer.
struct PathHeader {
  int32_t rank;     // R; N for a single-stage path
  int32_t v_path;   // the path whose V it uses, itself or an earlier one
  int32_t in_path;  // the first path with the same in_scale
};
struct Header {
  char magic[8];
  int32_t k, n, num_paths, single_stage;
  PathHeader paths[LB2_MAX_PATHS];  // num_paths of them are stored
};
// Of the order of a block (word.h), so that bytes of another machine are refused.
#if defined(__aarch64__)
constexpr char kMagic[8] = {'L', 'B', '2', 'A', 'R', 'M', '0', '1'};
#else
constexpr char kMagic[8] = {'L', 'B', '2', 'C', 'P', 'U', '0', '1'};
#endif

struct Stage {  // a first stage
  Matrix v;
  int64_t in_scale;  // offset
};
struct PathLayout {
  int stage;
  int64_t row;  // first row of its V in the matrix of the stage
  int64_t rank;
  Matrix u;                         // two-stage only
  int64_t out_scale, latent_scale;  // offsets
};
struct Layout {
  int64_t k, n;
  int num_paths, num_stages;
  bool single_stage;
  Stage stages[LB2_MAX_PATHS];
  PathLayout paths[LB2_MAX_PATHS];
  int64_t bytes;
};

// The header of a layer that check_layer passed. in_scale is compared by value.
Header make_header(const lb2_linear_args& layer) noexcept;

// Fails if the header is impossible or its layout does not fit 63 bits.
lb2_status lay_out(const Header& header, Layout* layout) noexcept;

// Reads and checks the header of stored bytes.
lb2_status read_layout(const void* layer, int64_t bytes, Header* header, Layout* layout) noexcept;

// Bytes of the stored header.
int64_t header_bytes(const Header& header) noexcept;

// Sign-accumulate operations for one token.
int64_t macs_per_token(const Layout& layout) noexcept;

}  // namespace lb2::cpu
