// Conversion between the portable and the prepacked layout.
#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "core/check.h"
#include "core/status.h"
#include "cpu/parallel.h"
#include "cpu/prepacked/layout.h"

namespace lb2::cpu {
namespace {

constexpr uint64_t kWordMask = (1u << kWordCols) - 1;
constexpr int64_t kChunkBytes = (kChunkCols + 7) / 8;

#include "cpu/prepacked/word.h"

struct PortableRows {
  char* words;     // row 0
  int64_t stride;  // bytes
  int64_t rows, cols;
};

constexpr int64_t kBitsBytes = kChunkBytes + 16;  // of a chunk's bits, readable 8 bytes at a time

// The bytes that hold bits [first, first + count) of a row; what follows the last bit becomes 0.
void load_bits(const char* row, int64_t first, int64_t count, uint8_t* bits) {
  const int64_t last = first % 8 + count;
  std::memcpy(bits, row + first / 8, static_cast<size_t>((last + 7) / 8));
  std::memset(bits + (last + 7) / 8, 0, static_cast<size_t>(kBitsBytes - (last + 7) / 8));
  if (last % 8 != 0) bits[last / 8] = static_cast<uint8_t>(bits[last / 8] & ((1 << last % 8) - 1));
}

uint64_t load64(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
  return value;
}

// Calls visit(row of the portable matrix, its first word, bytes between words) for the rows of one tile.
template <typename Visit>
void for_rows(const Matrix& m, char* layer, int64_t chunk, int64_t tile, int64_t first_row, int64_t rows,
              const Visit& visit) {
  const int64_t blocks = m.tile_blocks(tile), start = tile * kTileBlocks * kBlockRows;
  char* data = layer + m.tile_offset(chunk, tile);
  for (int64_t r = 0; r < blocks * kBlockRows; ++r) {
    const int64_t row = start + r - first_row;
    if (row < 0 || row >= rows) continue;
    visit(row, data + r / kBlockRows * kBlockBytes + row_offset(r % kBlockRows), blocks * kBlockBytes);
  }
}

void pack_tile(const Matrix& m, char* layer, int64_t chunk, int64_t tile, int64_t first_row,
               const PortableRows& from) {
  const int64_t first = m.first_column(chunk), count = m.columns_of(chunk), words = m.words_of(chunk);
  for_rows(m, layer, chunk, tile, first_row, from.rows, [&](int64_t row, char* at, int64_t step) {
    uint8_t bits[kBitsBytes];
    load_bits(from.words + row * from.stride, first, count, bits);
    for (int64_t w = 0, bit = first % 8; w < words; ++w, bit += kWordCols, at += step) {
      const uint16_t word = static_cast<uint16_t>(load64(bits + bit / 8) >> (bit % 8) & kWordMask);
      store_word(word, at);
    }
  });
}

// Rows start as zeros; chunks add their bits in order, as neighbors can share a byte.
void unpack_tile(const Matrix& m, const char* layer, int64_t chunk, int64_t tile, int64_t first_row,
                 const PortableRows& to) {
  const int64_t first = m.first_column(chunk), count = m.columns_of(chunk), words = m.words_of(chunk);
  for_rows(m, const_cast<char*>(layer), chunk, tile, first_row, to.rows,
           [&](int64_t row, const char* at, int64_t step) {
             uint8_t bits[kBitsBytes] = {};
             const int64_t shift = first % 8;
             uint64_t pending = 0;  // bits that are not in `bits` yet
             int64_t count_pending = shift, stored = 0;
             for (int64_t w = 0; w < words; ++w, at += step) {
               pending |= static_cast<uint64_t>(load_word(at)) << count_pending;
               count_pending += kWordCols;
               if (count_pending >= 32) {
                 std::memcpy(bits + stored, &pending, 4);
                 pending >>= 32;
                 count_pending -= 32;
                 stored += 4;
               }
             }
             std::memcpy(bits + stored, &pending, 4);
             char* target = to.words + row * to.stride + first / 8;
             const int64_t bytes = (shift + count + 7) / 8;
             target[0] = static_cast<char>(target[0] | bits[0]);
             std::memcpy(target + 1, bits + 1, static_cast<size_t>(bytes - 1));
           });
}

lb2_status pack_matrix(const lb2_linear_args& args, const Matrix& m, char* layer, int64_t first_row,
                       const PortableRows& from) {
  const int64_t tiles = m.tiles();
  const int64_t bytes_per_tile = kTileBlocks * kBlockBytes * m.chunk_words;
  return run_parallel(args.parallel_for, args.parallel_context, m.num_chunks * tiles,
                      std::max<int64_t>(1, 65536 / bytes_per_tile), [&](int64_t begin, int64_t end) {
                        for (int64_t i = begin; i < end; ++i)
                          pack_tile(m, layer, i / tiles, i % tiles, first_row, from);
                      });
}

lb2_status unpack_matrix(const Matrix& m, const char* layer, int64_t first_row, const PortableRows& to,
                         lb2_parallel_for parallel_for, void* context) {
  for (int64_t row = 0; row < to.rows; ++row)
    std::memset(to.words + row * to.stride, 0, static_cast<size_t>(lb2_words_per_row(to.cols)) * 4);
  return run_parallel(parallel_for, context, m.tiles(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      for (int64_t chunk = 0; chunk < m.num_chunks; ++chunk)
        unpack_tile(m, layer, chunk, tile, first_row, to);
  });
}

PortableRows portable(const int32_t* words, int64_t stride, int64_t rows, int64_t cols) {
  return {const_cast<char*>(reinterpret_cast<const char*>(words)), stride * 4, rows, cols};
}

void copy_scale(void* to, const void* from, int64_t n) {
  if (to != nullptr) std::memcpy(to, from, static_cast<size_t>(n) * 4);
}

}  // namespace
}  // namespace lb2::cpu

using namespace lb2::cpu;

extern "C" lb2_status lb2_prepacked_bytes_cpu(const lb2_linear_args* args, int64_t* bytes) {
  lb2_layer_shape shape;
  LB2_RETURN_IF_ERROR(lb2::check_layer(args, &shape));
  if (bytes == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "bytes must not be NULL");
  Layout layout;
  LB2_RETURN_IF_ERROR(lay_out(make_header(*args), &layout));
  *bytes = layout.bytes;
  return LB2_OK;
}

extern "C" lb2_status lb2_prepack_cpu(const lb2_linear_args* args, void* layer, int64_t layer_bytes) {
  lb2_layer_shape shape;
  LB2_RETURN_IF_ERROR(lb2::check_layer(args, &shape));
  const Header header = make_header(*args);
  Layout layout;
  LB2_RETURN_IF_ERROR(lay_out(header, &layout));
  if (layer == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "layer must not be NULL");
  if (layer_bytes != layout.bytes)
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "layer_bytes must be %" PRId64 ", got %" PRId64,
                     layout.bytes, layer_bytes);
  char* out = static_cast<char*>(layer);
  std::memset(out, 0, static_cast<size_t>(layer_bytes));
  std::memcpy(out, &header, static_cast<size_t>(header_bytes(header)));
  for (int p = 0; p < layout.num_paths; ++p) {
    const lb2_path& path = args->paths[p];
    const PathLayout& placed = layout.paths[p];
    const Stage& stage = layout.stages[placed.stage];
    copy_scale(out + placed.out_scale, path.out_scale, layout.n);
    if (header.paths[p].in_path == p) copy_scale(out + stage.in_scale, path.in_scale, layout.k);
    if (header.paths[p].v_path == p)
      LB2_RETURN_IF_ERROR(
          pack_matrix(*args, stage.v, out, placed.row, portable(path.v, path.v_stride, path.rank, layout.k)));
    if (layout.single_stage) continue;
    copy_scale(out + placed.latent_scale, path.latent_scale, path.rank);
    LB2_RETURN_IF_ERROR(
        pack_matrix(*args, placed.u, out, 0, portable(path.u, path.u_stride, layout.n, path.rank)));
  }
  return LB2_OK;
}

extern "C" lb2_status lb2_prepacked_shape_cpu(const void* layer, int64_t layer_bytes,
                                              lb2_layer_shape* shape) {
  LB2_RETURN_IF_ERROR(lb2::check_shape_struct(shape));
  Header header;
  Layout layout;
  LB2_RETURN_IF_ERROR(read_layout(layer, layer_bytes, &header, &layout));
  *shape = {};
  shape->struct_size = sizeof *shape;
  shape->k = layout.k;
  shape->n = layout.n;
  shape->num_paths = layout.num_paths;
  shape->single_stage = layout.single_stage;
  for (int p = 0; p < layout.num_paths; ++p) {
    shape->ranks[p] = header.paths[p].rank;
    shape->shares[p] = header.paths[p].v_path;
  }
  return LB2_OK;
}

extern "C" lb2_status lb2_unprepack_cpu(const void* layer, int64_t layer_bytes, int64_t path, int32_t* v,
                                        int32_t* u, float* in_scale, float* latent_scale, float* out_scale,
                                        lb2_parallel_for parallel_for, void* parallel_context) {
  Header header;
  Layout layout;
  LB2_RETURN_IF_ERROR(read_layout(layer, layer_bytes, &header, &layout));
  if (path < 0 || path >= layout.num_paths)
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "path must be between 0 and %d, got %" PRId64,
                     layout.num_paths - 1, path);
  if (layout.single_stage && (u != nullptr || latent_scale != nullptr))
    return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "u and latent_scale must be NULL for a single-stage layer");
  const char* in = static_cast<const char*>(layer);
  const PathLayout& placed = layout.paths[path];
  const Stage& stage = layout.stages[placed.stage];
  copy_scale(in_scale, in + stage.in_scale, layout.k);
  copy_scale(out_scale, in + placed.out_scale, layout.n);
  copy_scale(latent_scale, in + placed.latent_scale, placed.rank);
  if (v != nullptr)
    LB2_RETURN_IF_ERROR(unpack_matrix(stage.v, in, placed.row,
                                      portable(v, lb2_words_per_row(layout.k), placed.rank, layout.k),
                                      parallel_for, parallel_context));
  if (u != nullptr)
    LB2_RETURN_IF_ERROR(unpack_matrix(placed.u, in, 0,
                                      portable(u, lb2_words_per_row(placed.rank), layout.n, placed.rank),
                                      parallel_for, parallel_context));
  return LB2_OK;
}
