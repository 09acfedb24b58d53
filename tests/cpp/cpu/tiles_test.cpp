// Kernels on the tiles of AMX: accuracy, independence of what is beside a token, integers at their limits,
// values that are not finite, what AUTO chooses, and the thread's own tiles. Runs on a processor with AMX, or
// with tiles on arrays (LB2_EMULATE_AMX).
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "littlebit2/littlebit2.h"
#include "random_problem.h"
#if defined(LB2_EMULATE_AMX)
#include "amx_host/tiles.h"
#endif

namespace {

constexpr int kSkipped = 77;  // what ctest takes for it

// A prepacked layer of one path or two.
struct TestLayer {
  int64_t k, n;
  std::vector<Path> paths;
  std::vector<char> data;

  TestLayer(int64_t columns, int64_t rows, std::initializer_list<int64_t> ranks) : k(columns), n(rows) {
    std::vector<lb2_path> args_paths;
    for (const int64_t rank : ranks) {
      paths.emplace_back();
      Path& path = paths.back();
      path.rank = rank;
      path.in_scale = random_floats(k);
      path.latent_scale = random_floats(rank);
      path.out_scale = random_floats(n);
      path.buffers.push_back(random_words(rank, k, lb2_words_per_row(k), 0, path.v));
      path.buffers.push_back(random_words(n, rank, lb2_words_per_row(rank), 0, path.u));
    }
    for (Path& path : paths)
      args_paths.push_back({reinterpret_cast<const int32_t*>(path.buffers[0].data), lb2_words_per_row(k),
                            reinterpret_cast<const int32_t*>(path.buffers[1].data),
                            lb2_words_per_row(path.rank), path.in_scale.data(), path.latent_scale.data(),
                            path.out_scale.data(), path.rank});
    lb2_linear_args args = {};
    args.struct_size = sizeof args;
    args.k = k;
    args.n = n;
    args.paths = args_paths.data();
    args.num_paths = static_cast<int64_t>(paths.size());
    int64_t bytes = 0;
    if (lb2_prepacked_bytes_cpu(&args, &bytes) != LB2_OK) std::abort();
    data.resize(static_cast<size_t>(bytes));
    if (lb2_prepack_cpu(&args, data.data(), bytes) != LB2_OK) std::abort();
  }

  lb2_prepacked_args args(const std::vector<float>& x, std::vector<float>* y, lb2_activation activation,
                          lb2_isa isa) const {
    lb2_prepacked_args args = {};
    args.struct_size = sizeof args;
    args.layer = data.data();
    args.layer_bytes = static_cast<int64_t>(data.size());
    args.m = static_cast<int64_t>(x.size()) / k;
    args.input = x.data();
    args.input_stride = k;
    y->assign(static_cast<size_t>(args.m * n), 0.0f);
    args.output = y->data();
    args.output_stride = n;
    args.activation = activation;
    args.isa = isa;
    return args;
  }

  // y of x [m, k].
  std::vector<float> run(const std::vector<float>& x, lb2_activation activation, lb2_isa isa = LB2_ISA_AMX,
                         int32_t threads = 1) const {
    std::vector<float> y;
    lb2_prepacked_args call = args(x, &y, activation, isa);
    if (threads > 1) call.parallel_for = parallel_for;
    call.num_threads = threads;
    lb2_prepacked_plan plan = {};
    plan.struct_size = sizeof plan;
    if (lb2_prepacked_plan_cpu(&call, &plan) != LB2_OK) std::abort();
    std::vector<char> workspace(static_cast<size_t>(plan.workspace_bytes));
    call.workspace = workspace.data();
    call.workspace_bytes = plan.workspace_bytes;
    if (lb2_prepacked_forward_cpu(&call) != LB2_OK) {
      std::fprintf(stderr, "%s\n", lb2_last_error());
      std::abort();
    }
    return y;
  }
};

bool same_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * 4) == 0;
}

std::vector<float> tokens_of(const std::vector<float>& x, int64_t k, int64_t first, int64_t count) {
  return std::vector<float>(x.begin() + first * k, x.begin() + (first + count) * k);
}

bool failed(int index, const char* what) {
  std::fprintf(stderr, "problem %d: %s\n", index, what);
  return false;
}

// Error, and bits whatever the tokens beside a token and the threads.
bool run_problem(int index) {
  const int64_t k = pick({15, 60, 64, 511, 721, 1450}), n = pick({16, 33, 130, 300}),
                rank = pick({8, 64, 200, 744});
  const TestLayer layer = index % 2 ? TestLayer(k, n, {rank}) : TestLayer(k, n, {rank, 24});
  const int64_t m = pick({1, 15, 16, 17, 31, 33, 64, 70});
  const std::vector<float> x = random_floats(m * k);
  const std::vector<float> y = layer.run(x, LB2_ACTIVATION_INT8X2);
  double error = 0.0, norm = 0.0, typical = 0.0;
  for (int64_t t = 0; t < m; ++t) {
    const std::vector<double> input(x.begin() + t * k, x.begin() + (t + 1) * k);
    std::vector<double> expected(static_cast<size_t>(n), 0.0);
    typical += reference(layer.paths, false, false, k, n, input.data(), expected.data());
    for (int64_t i = 0; i < n; ++i) {
      error += std::pow(y[t * n + i] - expected[i], 2);
      norm += std::pow(expected[i], 2);
    }
  }
  if (!(std::sqrt(error / std::max(norm, typical)) <= 1e-4)) {
    std::fprintf(stderr, "k %ld n %ld rank %ld m %ld: relative error %.2e\n", static_cast<long>(k),
                 static_cast<long>(n), static_cast<long>(rank), static_cast<long>(m),
                 std::sqrt(error / norm));
    return failed(index, "INT8X2 is less accurate than it should be");
  }
  const int64_t first = static_cast<int64_t>(engine() % static_cast<uint64_t>(m));
  const int64_t count = 1 + static_cast<int64_t>(engine() % static_cast<uint64_t>(m - first));
  const std::vector<float> part = layer.run(tokens_of(x, k, first, count), LB2_ACTIVATION_INT8X2);
  if (!same_bits(part.data(), y.data() + first * n, count * n))
    return failed(index, "a token depends on those beside it");
  if (layer.run(x, LB2_ACTIVATION_INT8X2, LB2_ISA_AMX, 3) != y)
    return failed(index, "bits depend on the threads");
  if (layer.run(x, LB2_ACTIVATION_INT8) != layer.run(x, LB2_ACTIVATION_INT8, LB2_ISA_SCALAR))
    return failed(index, "INT8 on tiles and by lookup differ in their bits");
  if (layer.run(x, LB2_ACTIVATION_INT16) != layer.run(x, LB2_ACTIVATION_INT16, LB2_ISA_SCALAR))
    return failed(index, "INT16 is not the mode of lookup");
  return true;
}

// Rows of the signs of the activations and of their opposites, all of one magnitude: the largest sums there
// are. The layer has one path and a latent for each row, scaled by 1.
bool keeps_largest_sums() {
  const int64_t k = 720, rank = 8;
  TestLayer layer(k, rank, {rank});
  Path& path = layer.paths[0];
  std::vector<float> x(static_cast<size_t>(20 * k));
  for (int64_t t = 0; t < 20; ++t)
    for (int64_t c = 0; c < k; ++c)
      x[t * k + c] =
          static_cast<float>(path.v[(t % rank) * k + c]) / path.in_scale[c] * (t < 10 ? 3.0f : -3.0f);
  const std::vector<float> y = layer.run(x, LB2_ACTIVATION_INT8X2);
  for (int64_t t = 0; t < 20; ++t) {
    const std::vector<double> input(x.begin() + t * k, x.begin() + (t + 1) * k);
    std::vector<double> expected(static_cast<size_t>(rank), 0.0);
    reference(layer.paths, false, false, k, rank, input.data(), expected.data());
    double scale = 0.0;
    for (const float latent : path.latent_scale) scale += std::fabs(latent) * 2160.0;
    for (int64_t i = 0; i < rank; ++i)
      if (!(std::fabs(y[t * rank + i] - expected[i]) <= 1e-4 * scale * std::fabs(path.out_scale[i])))
        return failed(0, "a sum left its integers");
  }
  return true;
}

bool keeps_what_is_not_finite() {
  const TestLayer layer(721, 40, {64});
  std::vector<float> x = random_floats(20 * 721);
  const std::vector<float> before = layer.run(x, LB2_ACTIVATION_INT8X2);
  x[3 * 721 + 5] = std::numeric_limits<float>::quiet_NaN();
  x[7 * 721 + 720] = -std::numeric_limits<float>::infinity();
  const std::vector<float> y = layer.run(x, LB2_ACTIVATION_INT8X2);
  for (int64_t t = 0; t < 20; ++t) {
    if (t != 3 && t != 7) {
      if (!same_bits(&y[t * 40], &before[t * 40], 40))
        return failed(0, "a token that is not finite changes others");
      continue;
    }
    for (int64_t i = 0; i < 40; ++i)
      if (y[t * 40 + i] - y[t * 40 + i] == 0.0f)
        return failed(0, "a token that is not finite has finite results");
  }
  return true;
}

// Precision is kept down to about 1e-31.
bool keeps_small_tokens() {
  const TestLayer layer(300, 40, {64});
  std::vector<float> x = random_floats(16 * 300);
  const std::vector<float> y = layer.run(x, LB2_ACTIVATION_INT8X2);
  for (float& value : x) value *= 0x1p-70f;
  const std::vector<float> small = layer.run(x, LB2_ACTIVATION_INT8X2);
  for (size_t i = 0; i < y.size(); ++i)
    if (small[i] != y[i] * 0x1p-70f) return failed(0, "a power of two changes more than the exponent");
  const std::vector<float> zeros(16 * 300, 0.0f);
  for (const float value : layer.run(zeros, LB2_ACTIVATION_INT8X2))
    if (value != 0.0f) return failed(0, "zeros have results that are not");
  return true;
}

lb2_activation planned(const TestLayer& layer, int64_t m, lb2_dtype dtype, lb2_activation activation,
                       lb2_isa isa) {
  const std::vector<float> x(static_cast<size_t>(m * layer.k), 0.0f);
  std::vector<float> y;
  lb2_prepacked_args args = layer.args(x, &y, activation, isa);
  args.dtype = dtype;
  lb2_prepacked_plan plan = {};
  plan.struct_size = sizeof plan;
  return lb2_prepacked_plan_cpu(&args, &plan) == LB2_OK ? plan.activation : -1;
}

bool chooses_by_tokens() {
  const TestLayer layer(64, 40, {16});
  const lb2_isa amx = LB2_ISA_AMX;
  if (planned(layer, 15, LB2_BFLOAT16, LB2_ACTIVATION_AUTO, amx) != LB2_ACTIVATION_INT16 ||
      planned(layer, 16, LB2_BFLOAT16, LB2_ACTIVATION_AUTO, amx) != LB2_ACTIVATION_INT8X2 ||
      planned(layer, 16, LB2_FLOAT16, LB2_ACTIVATION_AUTO, amx) != LB2_ACTIVATION_INT8X2 ||
      planned(layer, 16, LB2_FLOAT32, LB2_ACTIVATION_AUTO, amx) != LB2_ACTIVATION_EXACT ||
      planned(layer, 16, LB2_BFLOAT16, LB2_ACTIVATION_AUTO, LB2_ISA_SCALAR) != LB2_ACTIVATION_INT16 ||
      planned(layer, 1, LB2_FLOAT32, LB2_ACTIVATION_INT8X2, amx) != LB2_ACTIVATION_INT8X2)
    return failed(0, "AUTO chose another mode");
  if (planned(layer, 16, LB2_BFLOAT16, LB2_ACTIVATION_INT8X2, LB2_ISA_SCALAR) != -1 ||
      std::strstr(lb2_last_error(), "INT8X2 needs the amx kernels, got the scalar kernels") == nullptr)
    return failed(0, "INT8X2 was not refused without tiles");
  return true;
}

#if defined(LB2_EMULATE_AMX)
// Tiles are used from 16 tokens on, in INT8 too, and the thread's configuration is what it was.
bool gives_tiles_back() {
  using lb2::amx_host::tiles;
  const TestLayer layer(100, 40, {16});
  const std::vector<float> x = random_floats(20 * 100);
  const auto products = [&](int64_t m, lb2_activation activation) {
    const int64_t before = tiles.products;
    layer.run(tokens_of(x, 100, 0, m), activation);
    return tiles.products - before;
  };
  // Two planes of 20 tokens are two tiles of tokens; V has 2 steps of 64 columns, one block; U 1 step, two
  // blocks.
  if (products(20, LB2_ACTIVATION_INT8X2) != 2 * 4 * (2 * 1 + 1 * 2) ||
      products(16, LB2_ACTIVATION_INT8) != 2 * 4 || products(15, LB2_ACTIVATION_INT8) != 0 ||
      products(20, LB2_ACTIVATION_INT16) != 0)
    return failed(0, "tiles were used for other calls, or as often as not planned");
  if (tiles.palette != 0) return failed(0, "a thread without tiles of its own has some left");
  uint8_t config[64] = {1};
  config[16] = 32;
  config[48] = 8;
  std::memcpy(tiles.config, config, 64);
  tiles.palette = 1;
  layer.run(x, LB2_ACTIVATION_INT8X2);
  const bool kept = tiles.palette == 1 && std::memcmp(tiles.config, config, 64) == 0 && tiles.rows[0] == 8 &&
                    tiles.columns[0] == 32 && tiles.rows[1] == 0;
  tiles = {};
  return kept || failed(0, "the configuration of the thread was not restored");
}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (!lb2_cpu_isa_available(LB2_ISA_AMX)) {
    std::printf("skipped: this CPU, operating system or build has no AMX\n");
    return kSkipped;
  }
  int failures = run_problems(argc, argv, problem_count(60), run_problem);
  engine.seed(1);
  failures +=
      !keeps_largest_sums() + !keeps_what_is_not_finite() + !keeps_small_tokens() + !chooses_by_tokens();
#if defined(LB2_EMULATE_AMX)
  failures += !gives_tiles_back();
#endif
  return failures != 0;
}
