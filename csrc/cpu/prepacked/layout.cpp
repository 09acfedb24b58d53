#include "cpu/prepacked/layout.h"

#include <cinttypes>
#include <cstddef>
#include <cstring>

#include "core/status.h"

namespace lb2::cpu {
namespace {

constexpr int64_t kMostSegments = 4;
constexpr int64_t kMostBytes = int64_t{1} << 56;

Matrix make_matrix(int64_t rows, int64_t cols, int64_t offset) {
  Matrix m = {};
  m.rows = rows;
  m.cols = cols;
  m.blocks = divide_up(rows, kBlockRows);
  m.words = divide_up(cols, kWordCols);
  int64_t chunks = divide_up(m.words, kChunkWords);
  m.num_segments = std::min(chunks, kMostSegments);
  chunks = divide_up(chunks, m.num_segments) * m.num_segments;
  m.chunk_words = divide_up(divide_up(m.words, chunks), 2) * 2;
  m.num_chunks = divide_up(m.words, m.chunk_words);
  m.segment_chunks = divide_up(m.num_chunks, m.num_segments);
  m.num_segments = divide_up(m.num_chunks, m.segment_chunks);
  m.offset = offset;
  return m;
}

bool same_values(const float* a, const float* b, int64_t n) {
  return a == b || std::memcmp(a, b, static_cast<size_t>(n) * sizeof(float)) == 0;
}

bool possible(const Header& header) {
  if (header.k < 1 || header.n < 1 || header.num_paths < 1 || header.num_paths > LB2_MAX_PATHS) return false;
  if (header.single_stage != 0 && header.single_stage != 1) return false;
  for (int p = 0; p < header.num_paths; ++p) {
    const PathHeader& path = header.paths[p];
    if (path.v_path < 0 || path.v_path > p || path.in_path < 0 || path.in_path > p) return false;
    const PathHeader& v_path = header.paths[path.v_path];
    if (v_path.v_path != path.v_path || v_path.rank != path.rank || v_path.in_path != path.in_path)
      return false;
    if (header.paths[path.in_path].in_path != path.in_path) return false;
    if (header.single_stage ? path.rank != header.n || path.v_path != p || path.in_path != p
                            : path.rank < 1 || path.rank % LB2_RANK_MULTIPLE != 0)
      return false;
  }
  return true;
}

}  // namespace

Header make_header(const lb2_linear_args& layer) noexcept {
  Header header = {};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.k = static_cast<int32_t>(layer.k);
  header.n = static_cast<int32_t>(layer.n);
  header.num_paths = static_cast<int32_t>(layer.num_paths);
  header.single_stage = layer.paths[0].u == nullptr;
  for (int p = 0; p < header.num_paths; ++p) {
    const lb2_path& path = layer.paths[p];
    PathHeader& stored = header.paths[p];
    stored = {static_cast<int32_t>(path.rank), p, p};
    if (header.single_stage) continue;
    for (int q = p - 1; q >= 0; --q) {
      const lb2_path& other = layer.paths[q];
      if (!same_values(path.in_scale, other.in_scale, layer.k)) continue;
      stored.in_path = header.paths[q].in_path;
      if (path.v == other.v && path.v_stride == other.v_stride && path.rank == other.rank)
        stored.v_path = header.paths[q].v_path;
    }
  }
  return header;
}

int64_t header_bytes(const Header& header) noexcept {
  return static_cast<int64_t>(offsetof(Header, paths)) +
         header.num_paths * static_cast<int64_t>(sizeof(PathHeader));
}

lb2_status lay_out(const Header& header, Layout* layout) noexcept {
  if (!possible(header))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "layer must be made by lb2_prepack_cpu, got an impossible header");
  layout->k = header.k;
  layout->n = header.n;
  layout->num_paths = header.num_paths;
  layout->num_stages = 0;
  layout->single_stage = header.single_stage;
  int64_t offset = align(header_bytes(header));
  bool overflow = false;
  const auto place = [&](int64_t bytes) {
    const int64_t start = offset;
    offset = align(offset + bytes);
    overflow = overflow || offset > kMostBytes;
    if (overflow) offset = 0;
    return start;
  };
  const auto place_matrix = [&](Matrix& m, int64_t rows, int64_t cols) {
    // Dimensions are below 2^31, but V of many paths may be one matrix. In doubles, which do not overflow.
    overflow =
        overflow || static_cast<double>(rows) * static_cast<double>(cols) > static_cast<double>(kMostBytes);
    m = make_matrix(overflow ? 1 : rows, overflow ? 1 : cols, offset);
    place(m.bytes());
  };
  for (int p = 0; p < header.num_paths; ++p) {
    const PathHeader& path = header.paths[p];
    PathLayout& placed = layout->paths[p];
    placed.rank = path.rank;
    if (path.v_path != p) {
      placed.stage = layout->paths[path.v_path].stage;
      placed.row = layout->paths[path.v_path].row;
    } else if (path.in_path != p) {
      placed.stage = layout->paths[path.in_path].stage;
      Matrix& v = layout->stages[placed.stage].v;
      placed.row = divide_up(v.rows, kBlockRows) * kBlockRows;
      v.rows = placed.row + path.rank;
    } else {
      placed.stage = layout->num_stages++;
      placed.row = 0;
      layout->stages[placed.stage].v.rows = path.rank;
    }
  }
  for (int s = 0; s < layout->num_stages; ++s) {
    Stage& stage = layout->stages[s];
    stage.in_scale = place(layout->k * 4);
    place_matrix(stage.v, stage.v.rows, layout->k);
  }
  for (int p = 0; p < header.num_paths; ++p) {
    PathLayout& path = layout->paths[p];
    path.out_scale = place(layout->n * 4);
    path.latent_scale = 0;
    if (layout->single_stage) continue;
    path.latent_scale = place(path.rank * 4);
    place_matrix(path.u, layout->n, path.rank);
  }
  if (overflow) return fail(LB2_ERROR_INVALID_ARGUMENT, "the layer must fit %" PRId64 " bytes", kMostBytes);
  layout->bytes = offset;
  return LB2_OK;
}

lb2_status read_layout(const void* layer, int64_t bytes, Header* header, Layout* layout) noexcept {
  if (layer == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "layer must not be NULL");
  std::memset(header, 0, sizeof *header);
  const int64_t fixed = offsetof(Header, paths);
  if (bytes >= fixed) std::memcpy(header, layer, static_cast<size_t>(fixed));
  if (bytes < fixed || std::memcmp(header->magic, kMagic, sizeof kMagic) != 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "layer must be made by lb2_prepack_cpu of this version, got %" PRId64 " bytes that are not",
                bytes);
  if (header->num_paths < 1 || header->num_paths > LB2_MAX_PATHS || bytes < header_bytes(*header))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "layer must be made by lb2_prepack_cpu, got an impossible header");
  std::memcpy(header, layer, static_cast<size_t>(header_bytes(*header)));
  LB2_RETURN_IF_ERROR(lay_out(*header, layout));
  if (layout->bytes != bytes)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "layer_bytes must be %" PRId64 " as the header of the layer says, got %" PRId64,
                layout->bytes, bytes);
  return LB2_OK;
}

int64_t macs_per_token(const Layout& layout) noexcept {
  int64_t macs = 0;
  for (int s = 0; s < layout.num_stages; ++s) macs += layout.stages[s].v.rows * layout.k;
  for (int p = 0; p < layout.num_paths && !layout.single_stage; ++p) macs += layout.paths[p].rank * layout.n;
  return macs;
}

}  // namespace lb2::cpu
