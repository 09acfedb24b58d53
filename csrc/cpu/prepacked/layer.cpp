#include "cpu/prepacked/layer.h"

#include "core/shape.h"

namespace lb2::cpu {
namespace {

constexpr int64_t kMostSumTokens = 32;  // LookupMode::tokens of any mode

// Around sums of a mode on tiles; nothing for other modes.
class TileScope {
 public:
  explicit TileScope(const LookupMode& mode) : mode_(mode) {
    if (mode.enter != nullptr) mode.enter(saved_);
  }
  ~TileScope() {
    if (mode_.leave != nullptr) mode_.leave(saved_);
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  const LookupMode& mode_;
  char saved_[kTileConfigBytes];
};

}  // namespace

// Row 0 of the sums of a segment.
float* LayerTasks::part(int stage, int64_t segment, int64_t token) const {
  return reinterpret_cast<float*>(workspace + plan.parts[stage]) +
         (segment * call.token_block + token) * layout().stages[stage].v.padded_rows();
}

// Sums of the rows of `tiles` over one chunk of m for the tokens of `range`, which load(token, columns,
// padded) provides one by one: row 0 of tile tiles.begin of token t goes to out + (t - range.begin) * stride.
template <typename Load>
void LayerTasks::sum_chunk(const Scratch& scratch, const Matrix& m, int64_t chunk, Range tiles, Range range,
                           const Load& load, float* out, int64_t stride, bool add) const {
  const int64_t words = m.words_of(chunk), columns = m.columns_of(chunk);
  const int64_t padded = (words * kWordCols + 15) / 16 * 16;
  float scales[kMostSumTokens];
  Tables tables = {scratch.tables, mode.token_bytes(words), scales, 0, columns};
  for (int64_t token = range.begin; token < range.end; token += tables.tokens) {
    tables.tokens = std::min(mode.tokens, range.end - token);
    for (int64_t t = 0; t < tables.tokens; ++t) {
      load(token + t, m.first_column(chunk), columns, padded, scratch.operand);
      scales[t] = mode.build(scratch.operand, words, scratch.tables + t * tables.stride);
    }
    const TileScope scope(mode);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const SignTile signs = {layer.data + m.tile_offset(chunk, tile), words, m.tile_blocks(tile)};
      float* rows = out + (token - range.begin) * stride + (tile - tiles.begin) * kTileBlocks * kBlockRows;
      mode.sums(signs, tables, {rows, stride, add});
    }
  }
}

// The input times in_scale, columns [first, first + columns) and zeros up to `padded`.
void LayerTasks::load_input(int stage, int64_t token, int64_t first, int64_t columns, int64_t padded,
                            float* out) const {
  // The vectors at the end of a chunk may read into the next one, which costs less than stopping short.
  const int64_t readable = std::min(padded, layout().k - first);
  const char* row = source.rows + (token * source.stride + first) * element_bytes(source.dtype);
  kernels.load_scaled(source.dtype, row, scale(layout().stages[stage].in_scale) + first, readable, padded,
                      out);
  if (source.norm != nullptr) {
    const lb2_norm& norm = *source.norm;
    const char* weight = static_cast<const char*>(norm.weight) + first * element_bytes(norm.dtype);
    kernels.scale_norm(norm.dtype, weight, norm.offset, source.factors[token], readable, out);
  }
  for (int64_t i = columns; i < readable; ++i) out[i] = 0.0f;
}

// latent_scale * (V @ (x * in_scale)), the same way.
void LayerTasks::load_latent(const PathLayout& path, int64_t token, int64_t first, int64_t columns,
                             int64_t padded, float* out) const {
  const Matrix& v = layout().stages[path.stage].v;
  const float* parts = part(path.stage, 0, token) + path.row + first;
  kernels.load_latents(parts, call.token_block * v.padded_rows(), v.num_segments,
                       scale(path.latent_scale) + first, columns, padded, out);
}

// The mean magnitude of an operand, in chunks of the matrix it meets: the scale of its signs.
template <typename Load>
float LayerTasks::mean_magnitude(const Scratch& scratch, const Matrix& m, const Load& load) const {
  float sum = 0.0f;
  for (int64_t chunk = 0; chunk < m.num_chunks; ++chunk) {
    const int64_t padded = (m.words_of(chunk) * kWordCols + 15) / 16 * 16;
    load(m.first_column(chunk), m.columns_of(chunk), padded, scratch.operand);
    sum += kernels.abs_sum(scratch.operand, padded);
  }
  return sum / static_cast<float>(m.cols);
}

int64_t LayerTasks::stage_tasks() const {
  int64_t units = 0;
  for (int s = 0; s < layout().num_stages && !layout().single_stage; ++s)
    units += layout().stages[s].v.num_segments;
  return units * plan.stage_splits * call.token_tasks;
}

void LayerTasks::run_stage(int64_t task, const Scratch& scratch) const {
  int64_t unit = task / call.token_tasks;
  const int64_t split = unit % plan.stage_splits;
  unit /= plan.stage_splits;
  int stage = 0;
  while (unit >= layout().stages[stage].v.num_segments) unit -= layout().stages[stage++].v.num_segments;
  const Matrix& v = layout().stages[stage].v;
  const Range tiles = piece(v.tiles(), split, plan.stage_splits);
  const Range range = token_piece(call, tokens, task);
  if (tiles.size() == 0 || range.size() == 0) return;
  float* out = part(stage, unit, range.begin) + tiles.begin * kTileBlocks * kBlockRows;
  const int64_t begin = unit * v.segment_chunks, end = std::min(begin + v.segment_chunks, v.num_chunks);
  const auto load = [&](int64_t token, int64_t first, int64_t columns, int64_t padded, float* z) {
    load_input(stage, token, first, columns, padded, z);
  };
  for (int64_t chunk = begin; chunk < end; ++chunk)
    sum_chunk(scratch, v, chunk, tiles, range, load, out, v.padded_rows(), chunk > begin);
}

void LayerTasks::sum_outputs(Range tiles, Range range, const Scratch& scratch, float* sums) const {
  const int64_t first_row = tiles.begin * kTileBlocks * kBlockRows;
  const int64_t stride = tiles.size() * kTileBlocks * kBlockRows;
  const int64_t rows = std::min(stride, layout().n - first_row);
  for (int p = 0; p < layout().num_paths; ++p) {
    const PathLayout& path = layout().paths[p];
    const Matrix& m = layout().single_stage ? layout().stages[path.stage].v : path.u;
    const auto load = [&](int64_t token, int64_t first, int64_t columns, int64_t padded, float* z) {
      if (layout().single_stage)
        load_input(path.stage, token, first, columns, padded, z);
      else
        load_latent(path, token, first, columns, padded, z);
    };
    for (int64_t chunk = 0; chunk < m.num_chunks; ++chunk)
      sum_chunk(scratch, m, chunk, tiles, range, load, scratch.dots, stride, chunk > 0);
    for (int64_t t = range.begin; t < range.end; ++t) {
      float factor = 1.0f;
      if (binarized()) {
        factor = mean_magnitude(scratch, m, [&](int64_t first, int64_t columns, int64_t padded, float* z) {
          load(t, first, columns, padded, z);
        });
        const auto load_x = [&](int64_t first, int64_t columns, int64_t padded, float* z) {
          load_input(path.stage, t, first, columns, padded, z);
        };
        if (!layout().single_stage) factor *= mean_magnitude(scratch, layout().stages[path.stage].v, load_x);
      }
      const int64_t row = (t - range.begin) * stride;
      kernels.scale_rows(scratch.dots + row, scale(path.out_scale) + first_row, factor, rows, p > 0,
                         sums + row);
    }
  }
  if (layer.bias == nullptr) return;
  for (int64_t t = 0; t < range.size(); ++t)
    kernels.add_bias(layer.bias + first_row, rows, sums + t * stride);
}

}  // namespace lb2::cpu
