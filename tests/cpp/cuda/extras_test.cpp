// Calls with what surrounds their layers (norm, activation function, residual; whole MLPs), executed on the
// host against a float64 computation of the same formulas, and in their launches.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/call.h"

namespace {

using Values = std::vector<double>;
using lb2::cuda::Order;
using lb2::cuda::host::runtime;

// A layer whose outputs are about as large as its inputs.
struct TestLayer {
  int64_t k, n;
  bool single_stage;
  std::vector<Path> paths;
  std::vector<lb2_path> args_paths;
  std::vector<float> bias;

  TestLayer(int64_t in_features, int64_t out_features, bool single, int64_t num_paths)
      : k(in_features), n(out_features), single_stage(single) {
    if (engine() % 2 == 0) bias = random_floats(n);
    for (int64_t p = 0; p < num_paths; ++p) {
      Path path;
      path.rank = single ? n : pick({8, 16, 40, 72, 520});
      path.in_scale = random_floats(k);
      path.out_scale = random_floats(n);
      const int64_t pitch = lb2_words_per_row(k) + pick({0, 1, 3});
      path.buffers.push_back(random_words(path.rank, k, pitch, 4, path.v));
      double columns = static_cast<double>(k);
      lb2_path args = {};
      args.v_stride = pitch;
      if (!single) {
        path.latent_scale = random_floats(path.rank);
        args.u_stride = lb2_words_per_row(path.rank);
        path.buffers.push_back(random_words(n, path.rank, args.u_stride, 0, path.u));
        columns *= static_cast<double>(path.rank);
      }
      for (float& scale : path.out_scale) scale /= static_cast<float>(std::sqrt(columns));
      args.rank = path.rank;
      paths.push_back(std::move(path));
      args_paths.push_back(args);
    }
    for (size_t p = 0; p < paths.size(); ++p) {
      const Path& path = paths[p];
      lb2_path& args = args_paths[p];
      args.v = reinterpret_cast<const int32_t*>(path.buffers[0].data);
      args.u = single ? nullptr : reinterpret_cast<const int32_t*>(path.buffers[1].data);
      args.in_scale = path.in_scale.data();
      args.latent_scale = single ? nullptr : path.latent_scale.data();
      args.out_scale = path.out_scale.data();
    }
  }

  lb2_linear_args args(int64_t m, lb2_dtype dtype) const {
    lb2_linear_args call = {};
    call.struct_size = sizeof call;
    call.m = m;
    call.k = k;
    call.n = n;
    call.paths = args_paths.data();
    call.num_paths = static_cast<int64_t>(paths.size());
    call.bias = bias.empty() ? nullptr : bias.data();
    call.dtype = dtype;
    return call;
  }

  Values apply(const Values& x) const {
    const size_t m = x.size() / static_cast<size_t>(k);
    Values y(m * static_cast<size_t>(n), 0.0);
    for (size_t t = 0; t < m; ++t) {
      double* row = y.data() + t * static_cast<size_t>(n);
      for (size_t i = 0; i < bias.size(); ++i) row[i] = bias[i];
      reference(paths, single_stage, false, k, n, x.data() + t * static_cast<size_t>(k), row);
    }
    return y;
  }
};

// Random elements [rows, cols] at a row pitch.
struct Elements {
  int64_t rows, cols, stride;
  lb2_dtype dtype;
  Buffer buffer{0, 0};

  Elements(int64_t num_rows, int64_t num_cols, int64_t pad, lb2_dtype type)
      : rows(num_rows), cols(num_cols), stride(num_cols + pad), dtype(type) {
    std::vector<char> bytes(static_cast<size_t>(this->bytes()));
    const int64_t element = element_bytes(dtype);
    for (int64_t i = 0; i < this->bytes() / element; ++i) random_element(dtype, bytes.data() + i * element);
    buffer = copy_out(bytes, element * pick({0, 1}));
  }
  int64_t bytes() const { return ((rows - 1) * stride + cols) * element_bytes(dtype); }
  lb2::cuda::Region region() const { return {buffer.data, static_cast<size_t>(bytes())}; }
  Values values() const {
    Values all;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c)
        all.push_back(decode(dtype, buffer.data + (r * stride + c) * element_bytes(dtype)));
    return all;
  }
};

Values normalize(const Values& x, const Values& weight, double eps, double offset) {
  Values y(x.size());
  const size_t k = weight.size();
  for (size_t first = 0; first < x.size(); first += k) {
    double squares = 0.0;
    for (size_t c = 0; c < k; ++c) squares += x[first + c] * x[first + c];
    const double norm = 1.0 / std::sqrt(squares / static_cast<double>(k) + eps);
    for (size_t c = 0; c < k; ++c) y[first + c] = x[first + c] * norm * (weight[c] + offset);
  }
  return y;
}

double apply_function(lb2_function function, double x) {
  switch (function) {
    case LB2_FUNCTION_SILU:
      return x / (1.0 + std::exp(-x));
    case LB2_FUNCTION_GELU:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case LB2_FUNCTION_GELU_TANH:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    default:
      return std::max(x, 0.0);
  }
}

double relative_error(const Values& truth, const Values& got) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (truth[i] - got[i]) * (truth[i] - got[i]);
    norm += truth[i] * truth[i];
  }
  return std::sqrt(error / norm);
}

struct Surroundings {
  bool normed, with_residual;
  Elements weight;
  lb2_norm norm;
  Surroundings(int64_t k)
      : normed(engine() % 4 != 0),
        with_residual(engine() % 3 != 0),
        weight(1, k, 0, static_cast<lb2_dtype>(engine() % 3)),
        norm{weight.buffer.data, weight.dtype, 1e-5f, engine() % 2 == 0 ? 1.0f : 0.0f} {}
  Values before(const Values& x) const {
    return normed ? normalize(x, weight.values(), norm.eps, norm.offset) : x;
  }
};

lb2_cuda_device random_device() {
  return {sizeof(lb2_cuda_device), static_cast<int32_t>(pick({80, 90, 100})),
          static_cast<int32_t>(pick({4, 132})), pick({48 * 1024, 227 * 1024})};
}

// Sets up the GPU for a call of `launches` launches that writes `written` and otherwise reads weights.
void prepare(const lb2_cuda_device& device, Order order, std::vector<lb2::cuda::Region> written,
             const std::vector<lb2_linear_args>& layers, const Surroundings& around, size_t launches) {
  lb2::cuda::host::Runtime& gpu = runtime();
  gpu.capability = device.capability;
  gpu.multiprocessors = device.multiprocessors;
  gpu.shared_bytes = static_cast<int>(device.shared_bytes);
  gpu.current = static_cast<int>(device.capability * 4 + device.shared_bytes / (64 * 1024));
  gpu.devices = gpu.current + 1;
  gpu.order = order;
  gpu.launches.clear();
  gpu.round = launches;
  gpu.written = std::move(written);
  gpu.layer = {around.weight.region()};
  for (const lb2_linear_args& args : layers)
    for (int64_t p = 0; p < args.num_paths; ++p) {
      gpu.layer.push_back({args.paths[p].in_scale, static_cast<size_t>(args.k) * 4});
      gpu.layer.push_back({args.paths[p].out_scale, static_cast<size_t>(args.n) * 4});
    }
}

bool passed(lb2_status status) {
  if (status == LB2_OK) return true;
  std::fprintf(stderr, "%s\n", lb2_last_error());
  return false;
}

bool close(const char* what, int index, const Values& truth, const Values& got, double most,
           lb2_activation activation, lb2_dtype dtype, int64_t m) {
  const double error = relative_error(truth, got);
  if (error <= most) return true;
  std::fprintf(stderr, "%s %d: activation %d, dtype %d, m=%d: relative error %.2e, at most %.2e\n", what,
               index, static_cast<int>(activation), static_cast<int>(dtype), static_cast<int>(m), error,
               most);
  return false;
}

int64_t random_tokens() { return pick({1, 1, 2, 3, 4, 5, 8, 11, 16, 17, 40}); }

// Layers on one input, with a norm and, of one layer, a residual.
bool run_projections(int index) {
  const lb2_dtype dtype = static_cast<lb2_dtype>(index % 3);
  const lb2_activation mode = pick({LB2_ACTIVATION_EXACT, LB2_ACTIVATION_INT16, LB2_ACTIVATION_FLOAT16});
  const int64_t m = random_tokens(), k = pick({40, 130, 512, 700, 1500, 4700});
  const bool single = index % 5 == 4;
  Surroundings around(k);
  const size_t count = around.with_residual ? 1 : 1 + engine() % 3;
  std::vector<TestLayer> layers;
  std::vector<lb2_linear_args> args;
  for (size_t i = 0; i < count; ++i)
    layers.emplace_back(k, pick({24, 37, 64, 130}), single, 1 + static_cast<int64_t>(engine() % 3));
  const Elements x(m, k, pick({0, 3}), dtype);
  const Elements residual(m, layers[0].n, pick({0, 5}), dtype);
  for (const TestLayer& layer : layers) {
    args.push_back(layer.args(m, dtype));
    args.back().input = x.buffer.data;
    args.back().input_stride = x.stride;
  }
  lb2_cuda_extras extras = {};
  extras.struct_size = sizeof extras;
  extras.norm = around.normed ? &around.norm : nullptr;
  extras.residual = around.with_residual ? residual.buffer.data : nullptr;
  extras.residual_stride = residual.stride;
  const lb2_cuda_device device = random_device();
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  const std::vector<lb2_layer_shape> shapes = shapes_of(args);
  if (!passed(lb2_projections_plan_cuda(shapes.data(), static_cast<int64_t>(count), m, dtype, mode, &device,
                                        nullptr, around.normed, &plan)))
    return false;
  std::vector<std::vector<char>> known;
  for (const Order order : {Order::kForward, Order::kShuffled}) {
    std::vector<Elements> outputs;
    for (const TestLayer& layer : layers) outputs.emplace_back(m, layer.n, pick({0, 2}), dtype);
    Buffer workspace(plan.workspace_bytes, 0);
    std::memset(workspace.data, 0xFF, static_cast<size_t>(plan.workspace_bytes));
    args[0].workspace = workspace.data;
    args[0].workspace_bytes = plan.workspace_bytes;
    std::vector<lb2::cuda::Region> written = {
        {workspace.data, static_cast<size_t>(plan.workspace_bytes)}, x.region(), residual.region()};
    for (size_t i = 0; i < count; ++i) {
      args[i].output = outputs[i].buffer.data;
      args[i].output_stride = outputs[i].stride;
      written.push_back(outputs[i].region());
    }
    // In calls of many tokens there are more launches.
    prepare(device, order, written, args, around, 100);
    if (!passed(
            lb2_projections_forward_cuda(args.data(), static_cast<int64_t>(count), &extras, &plan, nullptr)))
      return false;
    // Conversions are left out where blocks convert themselves.
    const size_t launches = runtime().launches.size(), planned = static_cast<size_t>(plan.num_launches);
    if (m <= 16 && (launches > planned || launches < (m <= 4 ? planned : planned / 2))) return false;
    const Values input = around.before(x.values());
    for (size_t i = 0; i < count; ++i) {
      Values truth = layers[i].apply(input);
      const Values added = residual.values();
      for (size_t at = 0; around.with_residual && at < truth.size(); ++at) truth[at] += added[at];
      const Values got = outputs[i].values();
      // Of many tokens, the residual is added to what is rounded already.
      const double most = 2.0 * tolerance(dtype) + 2.0 * mode_tolerance(mode, m * layers[i].n);
      if (!close("projections", index, truth, got, most, mode, dtype, m)) return false;
      const std::vector<char> bits(reinterpret_cast<const char*>(got.data()),
                                   reinterpret_cast<const char*>(got.data() + got.size()));
      if (order == Order::kForward)
        known.push_back(bits);
      else if (known[i] != bits)
        return failed("the order of threads changes a result", mode);
    }
  }
  return true;
}

// A whole MLP of each of the three kinds.
bool run_mlp(int index) {
  const lb2_dtype dtype = static_cast<lb2_dtype>(index % 3);
  const lb2_activation mode = pick({LB2_ACTIVATION_EXACT, LB2_ACTIVATION_INT16, LB2_ACTIVATION_FLOAT16});
  const lb2_function function = static_cast<lb2_function>(index % 4);
  const int64_t m = random_tokens(), k = pick({40, 130, 700, 1500}), width = pick({48, 101, 600, 1100});
  enum Kind { kGated, kHalves, kPlain } const kind = static_cast<Kind>(index / 3 % 3);
  Surroundings around(k);
  std::vector<TestLayer> layers;
  const auto paths = [] { return 1 + static_cast<int64_t>(engine() % 3); };
  if (kind == kGated) layers.emplace_back(k, width, false, paths());
  layers.emplace_back(k, kind == kHalves ? 2 * width : width, false, paths());
  layers.emplace_back(width, pick({24, 37, 64, 130}), engine() % 4 == 0, paths());
  const TestLayer& down = layers.back();
  const Elements x(m, k, pick({0, 3}), dtype), residual(m, down.n, pick({0, 5}), dtype);
  std::vector<lb2_linear_args> args;
  for (const TestLayer& layer : layers) args.push_back(layer.args(m, dtype));
  args[0].input = x.buffer.data;
  args[0].input_stride = x.stride;
  lb2_cuda_extras extras = {};
  extras.struct_size = sizeof extras;
  extras.norm = around.normed ? &around.norm : nullptr;
  extras.residual = around.with_residual ? residual.buffer.data : nullptr;
  extras.residual_stride = residual.stride;
  const lb2_cuda_device device = random_device();
  lb2_cuda_mlp_plan plan = {};
  plan.struct_size = sizeof plan;
  const int64_t count = static_cast<int64_t>(layers.size());
  const std::vector<lb2_layer_shape> shapes = shapes_of(args);
  if (!passed(lb2_mlp_plan_cuda(shapes.data(), count, m, dtype, mode, &device, around.normed, &plan)))
    return false;

  const Values input = around.before(x.values());
  const auto row = [&](size_t t, size_t c, size_t cols) { return t * cols + c; };
  const size_t w = static_cast<size_t>(width);
  const Values first = layers[0].apply(input);
  Values hidden(static_cast<size_t>(m) * w);
  const Values second = kind == kGated ? layers[1].apply(input) : Values();
  for (size_t t = 0; t < static_cast<size_t>(m); ++t)
    for (size_t c = 0; c < w; ++c) {
      const size_t cols = kind == kHalves ? 2 * w : w;
      double value = apply_function(function, first[row(t, c, cols)]);
      if (kind == kGated) value *= second[row(t, c, w)];
      if (kind == kHalves) value *= first[row(t, c + w, cols)];
      hidden[row(t, c, w)] = value;
    }
  Values truth = down.apply(hidden);
  const Values added = residual.values();
  for (size_t at = 0; around.with_residual && at < truth.size(); ++at) truth[at] += added[at];

  Values known;
  for (const Order order : {Order::kForward, Order::kShuffled}) {
    const Elements output(m, down.n, pick({0, 2}), dtype);
    args.back().output = output.buffer.data;
    args.back().output_stride = output.stride;
    const Buffer workspace(plan.workspace_bytes, 0);
    std::memset(workspace.data, 0xFF, static_cast<size_t>(plan.workspace_bytes));
    args[0].workspace = workspace.data;
    args[0].workspace_bytes = plan.workspace_bytes;
    prepare(device, order,
            {{workspace.data, static_cast<size_t>(plan.workspace_bytes)},
             x.region(),
             residual.region(),
             output.region()},
            args, around, 100);
    if (!passed(lb2_mlp_forward_cuda(args.data(), count, function, &extras, &plan, nullptr))) return false;
    const size_t stages = down.single_stage ? 3 : 4;
    const size_t launches = runtime().launches.size();
    if (m <= 16 && (launches < stages || launches > (m <= 4 ? 1 : 2) * stages))
      return failed("an MLP has other launches than those of its layers", mode);
    const double most = 3.0 * tolerance(dtype) + 6.0 * mode_tolerance(mode, m * down.n);
    const Values got = output.values();
    if (!close("mlp", index, truth, got, most, mode, dtype, m)) return false;
    if (known.empty()) known = got;
    if (std::memcmp(known.data(), got.data(), got.size() * sizeof(double)) != 0)
      return failed("the order of threads changes a result", mode);
  }
  return true;
}

// One MLP with everything around it, contiguous, in float32.
struct Mlp {
  static constexpr int64_t kTokens = 16, kK = 700, kWidth = 600, kN = 40;
  std::vector<TestLayer> layers;
  Surroundings around{kK};
  Elements x{kTokens, kK, 0, LB2_FLOAT32}, residual{kTokens, kN, 0, LB2_FLOAT32};
  lb2_cuda_device device = {sizeof(lb2_cuda_device), 90, 132, 227 * 1024};
  std::vector<lb2_linear_args> args;
  std::vector<lb2_layer_shape> shapes;
  lb2_cuda_extras extras = {};
  lb2_cuda_mlp_plan plan = {};
  std::vector<char> workspace;
  std::vector<float> y;

  Mlp() {
    layers.emplace_back(kK, kWidth, false, 2);
    layers.emplace_back(kK, kWidth, false, 1);
    layers.emplace_back(kWidth, kN, false, 1);
    extras.struct_size = sizeof extras;
    extras.norm = &around.norm;
    extras.residual_stride = kN;
  }

  // Plans for the tokens [first, first + m).
  void set(lb2_activation mode, int64_t first, int64_t m) {
    args.clear();
    for (const TestLayer& layer : layers) args.push_back(layer.args(m, LB2_FLOAT32));
    args[0].input = x.buffer.data + first * kK * 4;
    args[0].input_stride = kK;
    extras.residual = residual.buffer.data + first * kN * 4;
    shapes = shapes_of(args);
    plan.struct_size = sizeof plan;
    if (!passed(lb2_mlp_plan_cuda(shapes.data(), 3, m, LB2_FLOAT32, mode, &device, 1, &plan))) std::abort();
    workspace.assign(static_cast<size_t>(plan.workspace_bytes), -1);
    y.assign(static_cast<size_t>(m * kN), 0.0f);
    args[0].workspace = workspace.data();
    args[0].workspace_bytes = plan.workspace_bytes;
    args[2].output = y.data();
    args[2].output_stride = kN;
    prepare(device, Order::kForward, {}, args, around, 100);
    runtime().layer.clear();
  }

  lb2_status run(lb2_function function = LB2_FUNCTION_SILU) {
    return lb2_mlp_forward_cuda(args.data(), 3, function, &extras, &plan, nullptr);
  }
};

// A token has the same bits alone and in any batch of up to 16; and where the residual is the output.
bool run_batches(lb2_activation mode) {
  Mlp mlp;
  mlp.set(mode, 0, Mlp::kTokens);
  if (!passed(mlp.run())) return false;
  const std::vector<float> all = mlp.y;
  for (const int64_t count : {1, 2, 4, 7}) {
    const int64_t first = Mlp::kTokens - count;
    mlp.set(mode, first, count);
    if (!passed(mlp.run())) return false;
    if (!same_bits(mlp.y.data(), all.data() + first * Mlp::kN, count * Mlp::kN))
      return failed("a token's result depends on the others", mode);
  }
  mlp.set(mode, 0, Mlp::kTokens);
  std::memcpy(mlp.y.data(), mlp.residual.buffer.data, mlp.y.size() * 4);
  mlp.extras.residual = mlp.y.data();
  if (!passed(mlp.run())) return false;
  return same_bits(mlp.y.data(), all.data(), Mlp::kTokens * Mlp::kN) ||
         failed("a residual in place of the output gives another result", mode);
}

bool refuses(lb2_status status, const char* part) {
  if (status == LB2_ERROR_INVALID_ARGUMENT && std::strstr(lb2_last_error(), part) != nullptr) return true;
  std::fprintf(stderr, "not refused with '%s': status %d, %s\n", part, static_cast<int>(status),
               lb2_last_error());
  return false;
}

bool run_errors() {
  Mlp mlp;
  mlp.set(LB2_ACTIVATION_EXACT, 0, 2);
  bool good = passed(mlp.run());
  good = refuses(mlp.run(4), "function must be LB2_FUNCTION_SILU (0)") && good;
  lb2_norm& norm = mlp.around.norm;
  const lb2_norm kept = norm;
  norm.eps = -1.0f;
  good = refuses(mlp.run(), "norm->eps must be finite and >= 0, got -1") && good;
  norm = kept;
  norm.offset = INFINITY;
  good = refuses(mlp.run(), "norm->offset must be finite, got inf") && good;
  norm = kept;
  norm.dtype = LB2_INT8;
  good = refuses(mlp.run(), "norm->dtype must be LB2_FLOAT32 (0)") && good;
  norm = kept;
  norm.weight = nullptr;
  good = refuses(mlp.run(), "norm->weight must not be NULL") && good;
  norm = kept;
  mlp.extras.norm = nullptr;
  good = refuses(mlp.run(), "plan must be what was made for the sizes and paths of this call") && good;
  mlp.extras.norm = &norm;
  mlp.extras.struct_size = 8;
  good = refuses(mlp.run(), "extras->struct_size must equal sizeof(lb2_cuda_extras)") && good;
  mlp.extras.struct_size = sizeof mlp.extras;
  const void* residual = mlp.extras.residual;
  mlp.extras.residual = static_cast<const char*>(residual) + 2;
  good = refuses(mlp.run(), "residual must be aligned to 4 bytes") && good;
  mlp.extras.residual = residual;
  mlp.extras.residual_stride = -1;
  good = refuses(mlp.run(), "residual_stride must be >= 0, got -1") && good;
  mlp.extras.residual_stride = Mlp::kN;
  mlp.args[0].workspace_bytes -= 1;
  good = refuses(mlp.run(), "layers[0].workspace must hold") && good;
  mlp.args[0].workspace_bytes += 1;
  mlp.args[1].m = 1;
  good =
      refuses(mlp.run(), "layers[1].m and dtype must equal those of layers[0], 2 and 0, got 1 and 0") && good;
  mlp.args[1].m = 2;
  mlp.plan.workspace_bytes += 1;
  good = refuses(mlp.run(), "plan->workspace_bytes must be") && good;
  mlp.plan.workspace_bytes -= 1;
  mlp.plan.struct_size = 1;
  good = refuses(mlp.run(), "plan->struct_size must equal sizeof(lb2_cuda_mlp_plan)") && good;
  mlp.plan.struct_size = sizeof mlp.plan;
  const auto plan = [&](const std::vector<lb2_layer_shape>& shapes, int64_t count) {
    return lb2_mlp_plan_cuda(shapes.data(), count, 2, LB2_FLOAT32, LB2_ACTIVATION_AUTO, &mlp.device, 1,
                             &mlp.plan);
  };
  std::vector<lb2_layer_shape> shapes = mlp.shapes;
  shapes[1].n = 8;
  good = refuses(plan(shapes, 3), "n of gate and of up must be k of down, 600, got 600 and 8") && good;
  good = refuses(plan({shapes[1], shapes[2]}, 2), "n of up must be k of down, 600, or twice that, got 8") &&
         good;
  good = refuses(plan(shapes, 4), "num_layers of an MLP must be 2 or 3, got 4") && good;
  lb2_cuda_extras two = mlp.extras;
  two.norm = nullptr;
  good = refuses(lb2_projections_forward_cuda(mlp.args.data(), 2, &two, &mlp.plan.first, nullptr),
                 "layers[1].input_stride must equal that of layers[0]") &&
         good;
  mlp.args[1].input = mlp.args[0].input;
  mlp.args[1].input_stride = mlp.args[0].input_stride;
  good = refuses(lb2_projections_forward_cuda(mlp.args.data(), 2, &two, &mlp.plan.first, nullptr),
                 "residual must be NULL where there is more than one layer, got one with 2 layers") &&
         good;
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : problem_count(45);
  for (int i = 0; i < count; ++i)
    if (!run_projections(i) || !run_mlp(i)) return EXIT_FAILURE;
  for (lb2_activation mode = LB2_ACTIVATION_EXACT; mode <= LB2_ACTIVATION_FLOAT16; ++mode)
    if (!run_batches(mode)) return EXIT_FAILURE;
  if (!run_errors()) return EXIT_FAILURE;
  std::printf("%d problems passed\n", count);
  return EXIT_SUCCESS;
}
