// Shapes of launches measured beside the planner's choice. Up to 16 tokens: row warps of both stages, splits,
// chunks, chaining. More: both stages in one kernel, by clusters of blocks, and tiles and splits of the GEMM.
// One number is varied at a time, then the best of each are put together.
//
//   variants [FILE] [--tokens 1 8] [--modes int16 float16] [--repetitions 7]
//
// Calls are replayed as a graph over copies of the signs that together exceed the L2 cache (scales stay in
// it); variants take turns, and the median of their ratios to the planner's choice in the same turn is
// printed. Calls follow one another with nothing in between, so that a chained first launch overlaps our own
// last one. FILE gets JSON lines: the GPU first, then what was launched and how long it took.
#include <cuda_fp16.h>

#include <memory>
#include <string>
#include <vector>

#include "cuda/timing.h"
#include "littlebit2/cuda.h"

namespace {

constexpr int kPaths = 2;
constexpr int kMostCopies = 2048;
constexpr double kGain = 0.97;  // ratios above it are no gain

struct Shape {
  const char* name;
  int64_t k, n, rank;
};
// Two paths; ranks for 0.1, 0.55 and 1.0 counted bits per weight.
constexpr Shape kShapes[] = {
    {"4096->4096 at 0.1 bpw", 4096, 4096, 80},     {"4096->4096 at 1.0 bpw", 4096, 4096, 1000},
    {"4096->11008 at 0.1 bpw", 4096, 11008, 128},  {"11008->4096 at 0.55 bpw", 11008, 4096, 800},
    {"8192->28672 at 0.1 bpw", 8192, 28672, 296},  {"28672->8192 at 0.1 bpw", 28672, 8192, 296},
    {"8192->28672 at 1.0 bpw", 8192, 28672, 3168},
};

struct Mode {
  const char* name;
  lb2_activation value;
};
constexpr Mode kModes[] = {{"exact", LB2_ACTIVATION_EXACT},
                           {"int16", LB2_ACTIVATION_INT16},
                           {"int8", LB2_ACTIVATION_INT8},
                           {"sign", LB2_ACTIVATION_SIGN},
                           {"float16", LB2_ACTIVATION_FLOAT16}};

struct Options {
  const char* json = nullptr;
  std::vector<int64_t> tokens;
  std::vector<Mode> modes;
  int repetitions = 7;
};

[[noreturn]] void stop(const char* message, const char* detail) {
  std::fprintf(stderr, "error: %s: %s\n", message, detail);
  std::exit(2);
}

void check(lb2_status status) {
  if (status != LB2_OK) stop("littlebit2", lb2_last_error());
}

Options parse(int argc, char** argv) {
  Options options;
  std::string name;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) == 0) {
      name = word;
    } else if (name.empty() && options.json == nullptr) {
      options.json = argv[i];
    } else if (name == "--tokens" && std::atoi(argv[i]) > 0) {
      options.tokens.push_back(std::atoi(argv[i]));
    } else if (name == "--repetitions" && std::atoi(argv[i]) > 0) {
      options.repetitions = std::atoi(argv[i]);
    } else if (name == "--modes") {
      const auto* mode =
          std::find_if(std::begin(kModes), std::end(kModes), [&](const Mode& m) { return word == m.name; });
      if (mode == std::end(kModes))
        stop("--modes must be of exact, int16, int8, sign, float16, got", argv[i]);
      options.modes.push_back(*mode);
    } else {
      stop("not understood (see the head of variants.cu)", argv[i]);
    }
  }
  if (options.tokens.empty()) options.tokens = {1, 8};
  if (options.modes.empty()) options.modes = {kModes[1], kModes[4]};
  return options;
}

std::string describe(const lb2_cuda_tuning& t) {
  char text[128];
  const char* unchained = t.unchained ? ", unchained" : "";
  if (t.fused > 0)
    std::snprintf(text, sizeof text, "fused %d%s", t.fused, unchained);
  else if (t.fused < 0)
    std::snprintf(text, sizeof text, "GEMM %dx%d %dx%d, splits %d%s", t.gemm_rows[0], t.gemm_tokens[0],
                  t.gemm_rows[1], t.gemm_tokens[1], t.splits, unchained);
  else
    std::snprintf(text, sizeof text, "row_warps %d %d, splits %d, max_chunk %d%s", t.row_warps[0],
                  t.row_warps[1], t.splits, t.max_chunk, unchained);
  return text;
}

// What a plan chose, spelled out so that the rest of it stays when one number is varied.
lb2_cuda_tuning spell_out(const lb2_cuda_plan& planned) {
  lb2_cuda_tuning base = {};
  base.struct_size = sizeof base;
  for (const lb2_cuda_launch& launch : planned.launches) {
    if (launch.kind == LB2_CUDA_FUSED) base.fused = launch.grid_y;
    if (launch.kind == LB2_CUDA_GEMM) {
      base.fused = -1;
      base.gemm_rows[launch.stage] = launch.row_tile;
      base.gemm_tokens[launch.stage] = launch.token_tile;
    }
    if (launch.kind == LB2_CUDA_DECODE) base.row_warps[launch.stage] = launch.row_warps;
    if (launch.kind != LB2_CUDA_FUSED && launch.kind != LB2_CUDA_CONVERT && launch.stage == 0)
      base.splits = launch.grid_y;
  }
  return base;
}

// For prefill: the planner's choice, its kernel in other clusters, and the GEMM that it would choose, with
// other tiles of either stage and other splits. Those that there is no room for are left out later.
std::vector<lb2_cuda_tuning> prefill_tunings(int64_t k, const lb2_cuda_tuning& base,
                                             const lb2_cuda_tuning& gemm) {
  std::vector<lb2_cuda_tuning> all = {base};
  for (const int blocks : {1, 2, 4, 8}) {
    lb2_cuda_tuning fused = {};
    fused.struct_size = sizeof fused;
    fused.fused = blocks;
    if (base.fused != blocks) all.push_back(fused);
  }
  if (base.fused > 0) all.push_back(gemm);
  for (const auto& [rows, tokens] : {std::pair{64, 32}, {128, 32}, {128, 64}, {128, 128}})
    for (int stage = 0; stage < 2; ++stage) {
      if (gemm.gemm_rows[stage] == rows && gemm.gemm_tokens[stage] == tokens) continue;
      all.push_back(gemm);
      all.back().gemm_rows[stage] = rows;
      all.back().gemm_tokens[stage] = tokens;
    }
  for (int splits = 1; splits <= 32 && splits <= (k + 511) / 512; splits *= 2) {
    if (gemm.splits == splits) continue;
    all.push_back(gemm);
    all.back().splits = splits;
  }
  all.push_back(base);
  all.back().unchained = 1;
  return all;
}

// Of few tokens, the planner's choice first.
std::vector<lb2_cuda_tuning> tunings(int64_t k, const lb2_cuda_tuning& base) {
  std::vector<lb2_cuda_tuning> all = {base};
  const auto add = [&](auto member, int value) {
    if (member(base) == value) return;
    all.push_back(base);
    member(all.back()) = value;
  };
  for (const int warps : {1, 2, 4, 8}) {
    add([](auto& t) -> auto& { return t.row_warps[0]; }, warps);
    add([](auto& t) -> auto& { return t.row_warps[1]; }, warps);
  }
  for (int splits = 1; splits <= 32 && splits <= (k + 511) / 512; splits *= 2)
    add([](auto& t) -> auto& { return t.splits; }, splits);
  for (const int chunk : {1, 2, 4}) add([](auto& t) -> auto& { return t.max_chunk; }, chunk);
  add([](auto& t) -> auto& { return t.unchained; }, 1);
  return all;
}

// The best number of each kind together; what did not gain stays the planner's.
lb2_cuda_tuning combine(const std::vector<lb2_cuda_tuning>& all, const std::vector<double>& ratios) {
  lb2_cuda_tuning best = all[0];
  const auto take = [&](auto member) {
    double least = kGain;
    for (size_t i = 1; i < all.size(); ++i)
      if (member(all[i]) != member(all[0]) && ratios[i] < least) {
        least = ratios[i];
        member(best) = member(all[i]);
      }
  };
  take([](auto& t) -> auto& { return t.row_warps[0]; });
  take([](auto& t) -> auto& { return t.row_warps[1]; });
  take([](auto& t) -> auto& { return t.splits; });
  take([](auto& t) -> auto& { return t.max_chunk; });
  take([](auto& t) -> auto& { return t.unchained; });
  if (all[0].fused == 0) return best;
  // In prefill the numbers belong to launches of different kernels: the best of all as it is.
  const auto least = std::min_element(ratios.begin(), ratios.end());
  return *least < kGain ? all[static_cast<size_t>(least - ratios.begin())] : all[0];
}

__global__ void fill_words(uint32_t* words, size_t count) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count; i += stride) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + 12345u;
    x ^= x >> 15;
    x *= 2246822519u;
    words[i] = x ^ (x >> 13);
  }
}

// Numbers in [1/2, 3/2), as float32 or float16.
template <typename T>
__global__ void fill_numbers(T* values, size_t count) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count; i += stride)
    values[i] = static_cast<T>(0.5f + static_cast<float>((i * 37) % 101) / 101.0f);
}

class DeviceBytes {
 public:
  explicit DeviceBytes(size_t bytes) { LB2_CUDA(cudaMalloc(&data_, bytes)); }
  ~DeviceBytes() { cudaFree(data_); }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// Copies of a layer's signs, and everything else once.
class Layer {
 public:
  Layer(const Shape& shape, int64_t tokens)
      : shape_(shape),
        tokens_(tokens),
        v_stride_((lb2_words_per_row(shape.k) + 3) / 4 * 4),
        u_stride_((lb2_words_per_row(shape.rank) + 3) / 4 * 4),
        copy_words_(kPaths * (shape.rank * v_stride_ + shape.n * u_stride_)),
        copies_(copies_for(copy_words_ * 4)),
        words_(static_cast<size_t>(copies_ * copy_words_) * 4),
        scale_(static_cast<size_t>(std::max({shape.k, shape.n, shape.rank})) * 4),
        x_(static_cast<size_t>(tokens * shape.k) * 2),
        y_(static_cast<size_t>(tokens * shape.n) * 2) {
    fill_words<<<1024, 256>>>(words_.as<uint32_t>(), static_cast<size_t>(copies_ * copy_words_));
    fill_numbers<<<256, 256>>>(scale_.as<float>(),
                               static_cast<size_t>(std::max({shape.k, shape.n, shape.rank})));
    fill_numbers<<<256, 256>>>(x_.as<__half>(), static_cast<size_t>(tokens * shape.k));
    LB2_CUDA(cudaDeviceSynchronize());
  }

  int copies() const { return static_cast<int>(copies_); }
  int64_t bytes() const { return copy_words_ * 4; }

  lb2_cuda_plan plan(lb2_activation mode, const lb2_cuda_device& device, const lb2_cuda_tuning& tuning) {
    lb2_cuda_plan plan = {};
    check(try_plan(mode, device, tuning, &plan));
    return plan;
  }

  lb2_status try_plan(lb2_activation mode, const lb2_cuda_device& device, const lb2_cuda_tuning& tuning,
                      lb2_cuda_plan* plan) {
    lb2_layer_shape shape = {sizeof shape, shape_.k, shape_.n, kPaths, {}, {}, 0};
    for (int p = 0; p < kPaths; ++p) {
      shape.ranks[p] = shape_.rank;
      shape.shares[p] = p;
    }
    plan->struct_size = sizeof *plan;
    return lb2_linear_plan_cuda(&shape, tokens_, LB2_FLOAT16, mode, &device, &tuning, plan);
  }

  std::vector<uint16_t> outputs() const {
    std::vector<uint16_t> values(static_cast<size_t>(tokens_ * shape_.n));
    LB2_CUDA(cudaDeviceSynchronize());
    LB2_CUDA(cudaMemcpy(values.data(), y_.as<void>(), values.size() * 2, cudaMemcpyDeviceToHost));
    return values;
  }

  void queue(const lb2_cuda_plan& plan, void* workspace, cudaStream_t stream) {
    for (int64_t copy = 0; copy < copies_; ++copy) {
      lb2_path paths[kPaths];
      const lb2_linear_args args = arguments(copy, paths, workspace, plan.workspace_bytes);
      check(lb2_linear_forward_cuda(&args, &plan, stream));
    }
  }

 private:
  static int64_t copies_for(int64_t bytes) {
    const int64_t cache = lb2::bench::attribute(cudaDevAttrL2CacheSize);
    return std::min<int64_t>(kMostCopies, std::max<int64_t>(4, 2 * cache / bytes + 1));
  }

  lb2_linear_args arguments(int64_t copy, lb2_path* paths, void* workspace, int64_t workspace_bytes) {
    const int32_t* words = words_.as<int32_t>() + copy * copy_words_;
    for (int p = 0; p < kPaths; ++p) {
      paths[p] = {};
      paths[p].v = words;
      paths[p].v_stride = v_stride_;
      words += shape_.rank * v_stride_;
      paths[p].u = words;
      paths[p].u_stride = u_stride_;
      words += shape_.n * u_stride_;
      paths[p].in_scale = paths[p].latent_scale = paths[p].out_scale = scale_.as<float>();
      paths[p].rank = shape_.rank;
    }
    lb2_linear_args args = {};
    args.struct_size = sizeof args;
    args.m = tokens_;
    args.k = shape_.k;
    args.n = shape_.n;
    args.paths = paths;
    args.num_paths = kPaths;
    args.dtype = LB2_FLOAT16;
    args.input = x_.as<void>();
    args.input_stride = shape_.k;
    args.output = y_.as<void>();
    args.output_stride = shape_.n;
    args.workspace = workspace;
    args.workspace_bytes = workspace_bytes;
    return args;
  }

  Shape shape_;
  int64_t tokens_, v_stride_, u_stride_, copy_words_, copies_;
  DeviceBytes words_, scale_, x_, y_;
};

// One variant, ready to be timed.
struct Runner {
  std::unique_ptr<DeviceBytes> workspace;
  std::unique_ptr<lb2::bench::Graph> graph;
  std::vector<double> seconds;

  Runner(Layer& layer, const lb2_cuda_plan& plan)
      : workspace(new DeviceBytes(static_cast<size_t>(plan.workspace_bytes) + 1)),
        graph(new lb2::bench::Graph(
            [&](cudaStream_t stream) { layer.queue(plan, workspace->as<void>(), stream); })) {}
};

struct Measured {
  std::vector<double> seconds, ratios;  // medians, of a call; ratios to the first one
};

Measured measure(Layer& layer, lb2_activation mode, const lb2_cuda_device& device,
                 const std::vector<lb2_cuda_tuning>& all, int repetitions) {
  std::vector<Runner> runners;
  for (const lb2_cuda_tuning& tuning : all) runners.emplace_back(layer, layer.plan(mode, device, tuning));
  // Prefill launches give the same bits, however the tokens are cut up.
  std::vector<uint16_t> expected;
  for (size_t i = 0; i < all.size() && all[i].fused != 0; ++i) {
    runners[i].graph->seconds();
    const std::vector<uint16_t> got = layer.outputs();
    if (expected.empty()) expected = got;
    if (got != expected) stop("other bits than the planner's choice", describe(all[i]).c_str());
  }
  for (int i = 0; i < repetitions; ++i)
    for (size_t turn = 0; turn < runners.size(); ++turn) {
      Runner& runner = runners[(turn + static_cast<size_t>(i)) % runners.size()];
      runner.seconds.push_back(runner.graph->seconds() / layer.copies());
    }
  Measured measured;
  for (Runner& runner : runners) {
    std::vector<double> ratios;
    for (size_t i = 0; i < runner.seconds.size(); ++i)
      ratios.push_back(runner.seconds[i] / runners[0].seconds[i]);
    measured.seconds.push_back(lb2::bench::median(runner.seconds));
    measured.ratios.push_back(lb2::bench::median(ratios));
  }
  return measured;
}

// A line for everything measured, written at once: what was measured before an error is kept.
class Lines {
 public:
  explicit Lines(const char* path) : file_(path == nullptr ? nullptr : std::fopen(path, "w")) {
    if (path == nullptr) return;
    if (file_ == nullptr) stop("cannot be written", path);
    cudaDeviceProp gpu;
    int driver = 0, runtime = 0;
    LB2_CUDA(cudaGetDeviceProperties(&gpu, 0));
    LB2_CUDA(cudaDriverGetVersion(&driver));
    LB2_CUDA(cudaRuntimeGetVersion(&runtime));
    std::fprintf(
        file_,
        "{\"gpu\": \"%s\", \"capability\": %d, \"multiprocessors\": %d, \"l2_bytes\": %d, \"driver\": %d, "
        "\"runtime\": %d, \"littlebit2\": \"%s\"}\n",
        gpu.name, 10 * gpu.major + gpu.minor, gpu.multiProcessorCount, gpu.l2CacheSize, driver, runtime,
        lb2_version());
    flush();
  }
  ~Lines() {
    if (file_ != nullptr) std::fclose(file_);
  }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;

  void row(const Shape& shape, int64_t tokens, const char* mode, const Layer& layer,
           const lb2_cuda_plan& plan, double seconds, double ratio) {
    if (file_ == nullptr) return;
    std::fprintf(file_,
                 "{\"shape\": \"%s\", \"tokens\": %d, \"mode\": \"%s\", \"seconds\": %.6g, \"ratio\": %.4f, "
                 "\"copies\": %d, \"sign_bytes\": %lld, \"launches\": [",
                 shape.name, static_cast<int>(tokens), mode, seconds, ratio, layer.copies(),
                 static_cast<long long>(layer.bytes()));
    for (int i = 0; i < plan.num_launches; ++i) {
      const lb2_cuda_launch& l = plan.launches[i];
      std::fprintf(file_,
                   "%s{\"kind\": \"%s\", \"grid\": [%d, %d, %d], \"row_tile\": %d, \"token_tile\": %d, "
                   "\"row_warps\": %d, "
                   "\"chunk_slices\": %d, \"chained\": %d}",
                   i == 0 ? "" : ", ", kind_of(l), l.grid_x, l.grid_y, l.grid_z, l.row_tile, l.token_tile,
                   l.row_warps, l.chunk_slices, l.chained);
    }
    std::fprintf(file_, "]}\n");
    flush();
  }

 private:
  static const char* kind_of(const lb2_cuda_launch& launch) {
    switch (launch.kind) {
      case LB2_CUDA_CONVERT:
        return "convert";
      case LB2_CUDA_DECODE:
        return "decode";
      case LB2_CUDA_GEMM:
        return "gemm";
      default:
        return "fused";
    }
  }
  void flush() {
    if (std::fflush(file_) != 0) stop("cannot be written", "the file of results");
  }

  FILE* file_;
};

void measure_shape(const Shape& shape, int64_t tokens, const Mode& mode, const lb2_cuda_device& device,
                   int repetitions, Lines& lines) {
  Layer layer(shape, tokens);
  lb2_cuda_tuning none = {};
  none.struct_size = sizeof none;
  const lb2_cuda_tuning base = spell_out(layer.plan(mode.value, device, none));
  std::vector<lb2_cuda_tuning> all;
  if (base.fused == 0) {
    all = tunings(shape.k, base);
  } else {
    none.fused = -1;
    lb2_cuda_plan plan = {};
    for (const lb2_cuda_tuning& tuning :
         prefill_tunings(shape.k, base, spell_out(layer.plan(mode.value, device, none))))
      if (layer.try_plan(mode.value, device, tuning, &plan) == LB2_OK) all.push_back(tuning);
  }
  Measured measured = measure(layer, mode.value, device, all, repetitions);
  const lb2_cuda_tuning together = combine(all, measured.ratios);
  const Measured last = measure(layer, mode.value, device, {all[0], together}, repetitions);
  all.push_back(together);
  measured.seconds.push_back(last.seconds[1]);
  measured.ratios.push_back(last.ratios[1]);
  for (size_t i = 0; i < all.size(); ++i)
    lines.row(shape, tokens, mode.name, layer, layer.plan(mode.value, device, all[i]), measured.seconds[i],
              measured.ratios[i]);
  std::printf("%-24s M=%-3d %-8s planned (%s) %7.2f us, %4.0f GB/s of signs; together %.3fx: %s\n",
              shape.name, static_cast<int>(tokens), mode.name, describe(all[0]).c_str(),
              measured.seconds[0] * 1e6, static_cast<double>(layer.bytes()) / measured.seconds[0] / 1e9,
              last.ratios[1], describe(together).c_str());
  const int cache = lb2::bench::attribute(cudaDevAttrL2CacheSize);
  if (layer.copies() * layer.bytes() < cache)
    std::printf("    not cold: %d copies are smaller than the L2 cache\n", layer.copies());
  for (size_t i = 1; i + 1 < all.size(); ++i)
    if (measured.ratios[i] < kGain)
      std::printf("    %.3fx %s\n", measured.ratios[i], describe(all[i]).c_str());
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  lb2_cuda_device device = {};
  device.struct_size = sizeof device;
  check(lb2_cuda_get_device(0, &device));
  Lines lines(options.json);
  for (const Shape& shape : kShapes)
    for (const int64_t tokens : options.tokens)
      for (const Mode& mode : options.modes)
        measure_shape(shape, tokens, mode, device, options.repetitions, lines);
  return 0;
}
