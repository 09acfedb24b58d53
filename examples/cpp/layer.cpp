#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <stdexcept>
#include <utility>

namespace {

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

void check(lb2_status status) {
  if (status != LB2_OK) fail(lb2_last_error());
}

float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = half >> 10 & 0x1Fu,
                 fraction = half & 0x3FFu;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -magnitude : magnitude;
  }
  const uint32_t biased = exponent == 0x1F ? 0xFFu : exponent + 112;
  return float_from_bits(sign | biased << 23 | fraction << 13);
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// Suffix of the tensor names of a path: "", "_R", "_R2", ...
std::string path_suffix(int64_t path) {
  return path == 0 ? "" : path == 1 ? "_R" : "_R" + std::to_string(path);
}

// Letters to insert, remove or replace between two names.
size_t edits(const std::string& from, const std::string& to) {
  std::vector<size_t> row(to.size() + 1);
  for (size_t j = 0; j < row.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= from.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= to.size(); ++j) {
      const size_t replaced = diagonal + (from[i - 1] != to[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[to.size()];
}

// One path's tensors, read and checked.
struct PathTensors {
  std::vector<int32_t> v, u;
  std::vector<float> in_scale, latent_scale, out_scale;
  int64_t rank = 0, k = 0, n = 0;
};

// The tensors whose names begin with the layer's, and which of them were read.
class LayerReader {
 public:
  LayerReader(const SafetensorsFile& file, const std::string& name) : file_(file), prefix_(name + ".") {}

  std::string full(const std::string& leaf) const { return prefix_ + leaf; }
  // Throws if the file has no tensor of the layer; the message names layers that it has, similar names first.
  void check_known(const std::string& name) const {
    const auto first = file_.tensors().lower_bound(prefix_);
    if (first != file_.tensors().end() && first->first.compare(0, prefix_.size(), prefix_) == 0) return;
    std::vector<std::pair<size_t, std::string>> layers;
    const std::string mark = ".u1";
    for (const auto& entry : file_.tensors()) {
      const std::string& full = entry.first;
      if (full.size() > mark.size() && full.compare(full.size() - mark.size(), mark.size(), mark) == 0) {
        const std::string layer = full.substr(0, full.size() - mark.size());
        layers.emplace_back(edits(name, layer), layer);
      }
    }
    if (layers.empty()) fail(file_.path() + " holds no packed layer");
    std::sort(layers.begin(), layers.end());
    std::string some;
    for (size_t i = 0; i < layers.size() && i < 3; ++i) some += (i == 0 ? "" : ", ") + layers[i].second;
    fail(file_.path() + " holds no layer " + name + "; it has " + std::to_string(layers.size()) +
         " layers, such as " + some);
  }

  bool has(const std::string& leaf) const { return file_.tensors().count(prefix_ + leaf) != 0; }

  // The authors write U_R_packed for U_packed_R.
  std::string matrix(const std::string& letter, const std::string& kind, const std::string& suffix) const {
    const std::string ours = letter + "_" + kind + suffix, theirs = letter + suffix + "_" + kind;
    return !has(ours) && has(theirs) ? theirs : ours;
  }

  std::vector<int64_t> integers(const std::string& leaf, size_t count) {
    const TensorInfo& tensor = take(leaf);
    if (tensor.dtype != "I64" || tensor.bytes != static_cast<int64_t>(8 * count))
      wrong(leaf, "must hold " + std::to_string(count) + " of I64", tensor);
    return convert<int64_t>(tensor, count);
  }

  // [rows, ceil(cols / 32)] words, whose pad bits must be 0.
  std::vector<int32_t> words(const std::string& leaf, int64_t rows, int64_t cols) {
    const TensorInfo& tensor = take(leaf);
    const int64_t row_words = lb2_words_per_row(cols);
    const std::vector<int64_t> wanted = {rows, row_words};
    if (tensor.dtype != "I32" || tensor.shape != wanted)
      wrong(leaf, "must be I32 of shape " + shape_text(wanted), tensor);
    std::vector<int32_t> found = convert<int32_t>(tensor, static_cast<size_t>(rows * row_words));
    const uint32_t pad = cols % 32 == 0 ? 0 : ~uint32_t{0} << (cols % 32);
    for (int64_t row = 0; row < rows; ++row)
      if (static_cast<uint32_t>(found[static_cast<size_t>((row + 1) * row_words - 1)]) & pad)
        fail(prefix_ + leaf + " has a pad bit set in row " + std::to_string(row));
    return found;
  }

  // [size] or [1, size], in any of three dtypes.
  std::vector<float> scale(const std::string& leaf, int64_t size) {
    const TensorInfo& tensor = take(leaf);
    const std::vector<int64_t>& shape = tensor.shape;
    const bool row = shape.size() == 1 || (shape.size() == 2 && shape[0] == 1);
    const bool known = tensor.dtype == "F32" || tensor.dtype == "F16" || tensor.dtype == "BF16";
    if (!row || !known || shape.back() != size)
      wrong(leaf, "must be F32, F16 or BF16 with " + std::to_string(size) + " entries", tensor);
    const auto count = static_cast<size_t>(shape.back());
    std::vector<float> found;
    if (tensor.dtype == "F32") {
      found = convert<float>(tensor, count);
    } else {
      const bool half = tensor.dtype == "F16";
      for (const uint16_t bits : convert<uint16_t>(tensor, count))
        found.push_back(half ? from_float16(bits) : float_from_bits(static_cast<uint32_t>(bits) << 16));
    }
    for (const float value : found)
      if (!std::isfinite(value)) fail(prefix_ + leaf + " holds a value that is not finite");
    return found;
  }

  // Throws if a tensor of the layer was not read.
  void finish() const {
    static const std::set<std::string> extras = {"_eff_bit_target", "_eff_bit_actual", "_split_dim_final",
                                                 "_split_dim_R_final"};
    for (auto entry = file_.tensors().lower_bound(prefix_);
         entry != file_.tensors().end() && entry->first.compare(0, prefix_.size(), prefix_) == 0; ++entry)
      if (!used_.count(entry->first) && !extras.count(entry->first.substr(prefix_.size())))
        fail(entry->first + " is unexpected");
  }

 private:
  const TensorInfo& take(const std::string& leaf) {
    const auto found = file_.tensors().find(prefix_ + leaf);
    if (found == file_.tensors().end()) fail(prefix_ + leaf + " is missing");
    used_.insert(found->first);
    return found->second;
  }

  [[noreturn]] void wrong(const std::string& leaf, const std::string& expected,
                          const TensorInfo& tensor) const {
    fail(prefix_ + leaf + " " + expected + ", got " + tensor.dtype + " of shape " + shape_text(tensor.shape));
  }

  // The file holds little-endian values, as this machine does; `count` was checked against the tensor's size.
  template <typename T>
  std::vector<T> convert(const TensorInfo& tensor, size_t count) const {
    const std::vector<unsigned char> bytes = file_.read(tensor);
    std::vector<T> values(count);
    if (bytes.size() != count * sizeof(T))
      fail(file_.path() + ": a tensor has another size than its header says");
    if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

  const SafetensorsFile& file_;
  const std::string prefix_;
  std::set<std::string> used_;
};

// A stored logical size.
int64_t checked_size(int64_t size, const std::string& what) {
  if (size < 1 || size > INT32_MAX)
    fail(what + " must be between 1 and 2^31 - 1, got " + std::to_string(size));
  return size;
}

std::vector<float> read_latent_scale(LayerReader& reader, const std::string& suffix, int64_t rank) {
  const std::string product = "latent_scale" + suffix, v1 = "v1" + suffix, u2 = "u2" + suffix;
  if (reader.has(product)) {
    if (reader.has(v1) || reader.has(u2))
      fail(reader.full(product) + " must not be stored together with " + v1 + " and " + u2);
    return reader.scale(product, rank);
  }
  std::vector<float> scale = reader.scale(v1, rank);
  const std::vector<float> other = reader.scale(u2, rank);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] *= other[i];
  return scale;
}

// Reads path number `path` into `tensors`; returns the path whose first stage it uses, which may be itself.
int64_t read_path(LayerReader& reader, int64_t path, const std::vector<PathTensors>& earlier,
                  PathTensors* tensors) {
  const std::string suffix = path_suffix(path);
  int64_t source = path;
  if (reader.has("V_shared" + suffix)) {
    source = reader.integers("V_shared" + suffix, 1)[0];
    if (source < 0 || source >= path || earlier[static_cast<size_t>(source)].v.empty())
      fail(reader.full("V_shared" + suffix) + " must name an earlier path with a V of its own, got " +
           std::to_string(source));
    tensors->rank = earlier[static_cast<size_t>(source)].rank;
    tensors->k = earlier[static_cast<size_t>(source)].k;
  } else {
    const std::vector<int64_t> shape = reader.integers(reader.matrix("V", "shape", suffix), 2);
    tensors->rank = checked_size(shape[0], "the rank in " + reader.full("V_shape" + suffix));
    tensors->k = checked_size(shape[1], "K in " + reader.full("V_shape" + suffix));
    tensors->v = reader.words(reader.matrix("V", "packed", suffix), tensors->rank, tensors->k);
    tensors->in_scale = reader.scale("v2" + suffix, tensors->k);
  }
  if (reader.has(reader.matrix("U", "packed", suffix))) {
    const std::vector<int64_t> shape = reader.integers(reader.matrix("U", "shape", suffix), 2);
    tensors->n = checked_size(shape[0], "N in " + reader.full("U_shape" + suffix));
    if (shape[1] != tensors->rank)
      fail(reader.full("U_shape" + suffix) + " and V_shape" + suffix + " differ in the rank");
    tensors->u = reader.words(reader.matrix("U", "packed", suffix), tensors->n, tensors->rank);
    tensors->latent_scale = read_latent_scale(reader, suffix, tensors->rank);
  } else {
    tensors->n = tensors->rank;
  }
  tensors->out_scale = reader.scale("u1" + suffix, tensors->n);
  return source;
}

}  // namespace

Layer::Layer(const SafetensorsFile& file, const std::string& name, ThreadPool& pool) {
  LayerReader reader(file, name);
  reader.check_known(name);
  std::vector<PathTensors> tensors;
  std::vector<lb2_path> paths;
  tensors.reserve(LB2_MAX_PATHS);
  do {
    if (tensors.size() == LB2_MAX_PATHS)
      fail(name + " has more than " + std::to_string(LB2_MAX_PATHS) + " paths");
    const auto index = static_cast<int64_t>(tensors.size());
    PathTensors read;
    const int64_t source = read_path(reader, index, tensors, &read);
    tensors.push_back(std::move(read));
    const PathTensors& own = tensors.back();
    const PathTensors& first = tensors[static_cast<size_t>(source)];
    if (own.k != tensors[0].k || own.n != tensors[0].n) fail(name + " has paths that differ in K or N");
    lb2_path path{};
    path.v = first.v.data();
    path.v_stride = lb2_words_per_row(own.k);
    path.in_scale = first.in_scale.data();
    path.out_scale = own.out_scale.data();
    path.rank = own.rank;
    if (!own.u.empty()) {
      path.u = own.u.data();
      path.u_stride = lb2_words_per_row(own.rank);
      path.latent_scale = own.latent_scale.data();
    }
    paths.push_back(path);
  } while (reader.has("u1" + path_suffix(static_cast<int64_t>(tensors.size()))));
  if (reader.has("bias")) bias_ = reader.scale("bias", tensors[0].n);
  reader.finish();

  lb2_linear_args args{};
  args.struct_size = sizeof args;
  args.k = tensors[0].k;
  args.n = tensors[0].n;
  args.paths = paths.data();
  args.num_paths = static_cast<int64_t>(paths.size());
  args.parallel_for = ThreadPool::parallel_for;
  args.parallel_context = &pool;
  check(lb2_prepacked_bytes_cpu(&args, &bytes_));
  // The kernels are fastest on cache lines.
  const auto rounded = (static_cast<size_t>(bytes_) + 63) / 64 * 64;
  packed_.reset(std::aligned_alloc(64, rounded));
  if (packed_ == nullptr) fail("no memory for " + std::to_string(rounded) + " bytes of layer " + name);
  check(lb2_prepack_cpu(&args, packed_.get(), bytes_));
  shape_.struct_size = sizeof shape_;
  check(lb2_prepacked_shape_cpu(packed_.get(), bytes_, &shape_));
}

void Layer::forward(lb2_dtype dtype, int64_t m, const void* x, void* y, ThreadPool& pool,
                    Workspace& workspace) const {
  lb2_prepacked_args args{};
  args.struct_size = sizeof args;
  args.layer = packed_.get();
  args.layer_bytes = bytes_;
  args.m = m;
  args.bias = bias_.empty() ? nullptr : bias_.data();
  args.input = x;
  args.input_stride = shape_.k;
  args.output = y;
  args.output_stride = shape_.n;
  args.dtype = dtype;
  args.num_threads = pool.threads();
  args.parallel_for = ThreadPool::parallel_for;
  args.parallel_context = &pool;
  lb2_prepacked_plan plan{};
  plan.struct_size = sizeof plan;
  check(lb2_prepacked_plan_cpu(&args, &plan));
  if (workspace.size() < static_cast<size_t>(plan.workspace_bytes))
    workspace.resize(static_cast<size_t>(plan.workspace_bytes));
  args.isa = plan.isa;
  args.workspace = workspace.data();
  args.workspace_bytes = static_cast<int64_t>(workspace.size());
  check(lb2_prepacked_forward_cpu(&args));
}
