// Random groups of prepacked layers and random MLPs, with norms and residuals, against float64 on every
// instruction set, which must agree to the bit whatever the threads. A layer of a group without a norm must
// have the bits of its own call. Then arguments that must be refused.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "littlebit2/littlebit2.h"
#include "random_problem.h"

namespace {

using Doubles = std::vector<double>;

bool failed_call(int index, const char* what, lb2_status status) {
  if (status == LB2_OK) return false;
  std::fprintf(stderr, "problem %d: %s: %s\n", index, what, lb2_last_error());
  return true;
}

// A prepacked layer whose outputs are about as large as its inputs.
struct TestLayer {
  int64_t k, n;
  bool single_stage;
  std::vector<Path> paths;
  std::vector<float> bias;
  Buffer bias_data{0, 0}, data{0, 0};
  int64_t bytes = 0;

  TestLayer(int64_t columns, int64_t rows, int64_t misaligned)
      : k(columns), n(rows), single_stage(engine() % 4 == 0) {
    const int64_t num_paths = pick({1, 1, 2, 3});
    const bool same_scale = engine() % 3 == 0;
    std::vector<lb2_path> args_paths;
    paths.resize(static_cast<size_t>(num_paths));
    for (Path& path : paths) {
      path.rank = single_stage ? n : pick({8, 16, 40, 96});
      const double gain = std::sqrt(static_cast<double>(k * num_paths * (single_stage ? 1 : path.rank)));
      path.in_scale = same_scale ? random_like(paths[0].in_scale, k) : random_floats(k);
      path.out_scale = random_floats(n);
      for (float& value : path.out_scale) value /= static_cast<float>(gain);
      lb2_path args = {};
      args.rank = path.rank;
      args.v_stride = lb2_words_per_row(k);
      path.buffers.push_back(random_words(path.rank, k, args.v_stride, misaligned, path.v));
      args.v = reinterpret_cast<const int32_t*>(path.buffers.back().data);
      if (!single_stage) {
        path.latent_scale = random_floats(path.rank);
        args.latent_scale = path.latent_scale.data();
        args.u_stride = lb2_words_per_row(path.rank);
        path.buffers.push_back(random_words(n, path.rank, args.u_stride, misaligned, path.u));
        args.u = reinterpret_cast<const int32_t*>(path.buffers.back().data);
      }
      args.in_scale = path.in_scale.data();
      args.out_scale = path.out_scale.data();
      args_paths.push_back(args);
    }
    if (engine() % 2) {
      bias = random_floats(n);
      bias_data = copy_out(bias, misaligned);
    }
    lb2_linear_args args = {};
    args.struct_size = sizeof args;
    args.k = k;
    args.n = n;
    args.paths = args_paths.data();
    args.num_paths = num_paths;
    if (lb2_prepacked_bytes_cpu(&args, &bytes) != LB2_OK) std::abort();
    data = Buffer(bytes, misaligned);
    if (lb2_prepack_cpu(&args, data.data, bytes) != LB2_OK) std::abort();
  }

  static std::vector<float> random_like(const std::vector<float>& known, int64_t count) {
    return known.empty() ? random_floats(count) : known;
  }
  lb2_prepacked_layer view() const {
    return {data.data, bytes, bias.empty() ? nullptr : reinterpret_cast<const float*>(bias_data.data)};
  }
  // Adds the mean square of an output over random signs to *typical.
  Doubles apply(const Doubles& x, double* typical) const {
    Doubles y(static_cast<size_t>(n), 0.0);
    *typical += reference(paths, single_stage, false, k, n, x.data(), y.data());
    for (size_t i = 0; i < bias.size(); ++i) y[i] += bias[i];
    return y;
  }
};

struct Matrix {
  int64_t rows, cols, stride;
  lb2_dtype dtype;
  Buffer data{0, 0};
  int64_t elements() const { return rows == 0 ? 0 : (rows - 1) * stride + cols; }
  Matrix(int64_t m, int64_t columns, lb2_dtype type, bool may_repeat, int64_t misaligned)
      : rows(m), cols(columns), dtype(type) {
    stride = may_repeat && engine() % 8 == 0 ? 0 : cols + static_cast<int64_t>(engine() % 4);
    data = Buffer(elements() * element_bytes(dtype), misaligned);
    for (int64_t i = 0; i < elements(); ++i) random_element(dtype, data.data + i * element_bytes(dtype));
  }
  Doubles row(int64_t t) const {
    Doubles values(static_cast<size_t>(cols));
    for (int64_t i = 0; i < cols; ++i)
      values[i] = decode(dtype, data.data + (t * stride + i) * element_bytes(dtype));
    return values;
  }
  void fill() { std::memset(data.data, 0x5A, static_cast<size_t>(elements() * element_bytes(dtype))); }
  std::vector<char> bytes() const {
    return std::vector<char>(data.data, data.data + elements() * element_bytes(dtype));
  }
};

// Relative error, or infinity if anything was written between the rows.
double error_of(const Matrix& output, const std::vector<Doubles>& expected, double typical) {
  double error = 0.0, norm = 0.0;
  for (int64_t t = 0; t < output.rows; ++t) {
    const Doubles row = output.row(t);
    for (size_t i = 0; i < row.size(); ++i) {
      // Half the distance of subnormal halves.
      const double least = output.dtype == LB2_FLOAT16 ? 0x1p-25 : 0.0;
      error += std::pow(std::max(0.0, std::fabs(row[i] - expected[t][i]) - least), 2);
      norm += std::pow(expected[t][i], 2);
    }
    const int64_t bytes = element_bytes(output.dtype);
    for (int64_t b = output.cols * bytes; b < output.stride * bytes && t + 1 < output.rows; ++b)
      if (output.data.data[t * output.stride * bytes + b] != 0x5A) return INFINITY;
  }
  norm = std::max(norm, typical);
  return norm > 0.0 ? std::sqrt(error / norm) : std::sqrt(error);
}

// The norm of a problem, or none.
struct TestNorm {
  bool used;
  lb2_norm norm = {};
  Matrix weight;
  TestNorm(int64_t k, int64_t misaligned)
      : used(engine() % 2),
        weight(1, k, static_cast<lb2_dtype>(pick({LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16})), false,
               misaligned) {
    norm = {weight.data.data, weight.dtype, static_cast<float>(pick({0, 1})) * 1e-5f + 1e-6f,
            static_cast<float>(pick({0, 1}))};
  }
  const lb2_norm* pointer() const { return used ? &norm : nullptr; }
  Doubles apply(Doubles x) const {
    if (!used) return x;
    double sum = 0.0;
    for (const double value : x) sum += value * value;
    const double scale = 1.0 / std::sqrt(sum / static_cast<double>(x.size()) + norm.eps);
    const Doubles weights = weight.row(0);
    for (size_t i = 0; i < x.size(); ++i) x[i] *= scale * (weights[i] + norm.offset);
    return x;
  }
};

double function_of(lb2_function function, double x) {
  if (function == LB2_FUNCTION_SILU) return x / (1.0 + std::exp(-x));
  if (function == LB2_FUNCTION_GELU) return x / 2 * std::erfc(-x / std::sqrt(2.0));
  if (function == LB2_FUNCTION_GELU_TANH)
    return x / (1.0 + std::exp(-2.0 * std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
  return std::max(x, 0.0);
}

// The 8-bit and 1-bit modes are approximations: only their agreement is tested here, and int16 of several
// layers of few terms has no tight bound.
double allowed(lb2_activation activation, lb2_dtype dtype) {
  if (activation == LB2_ACTIVATION_EXACT) return tolerance(dtype) + 1e-5;
  if (activation == LB2_ACTIVATION_INT8X2) return tolerance(dtype) + 3e-3;
  return activation == LB2_ACTIVATION_INT16 ? tolerance(dtype) + 3e-2 : INFINITY;
}

template <typename Args>
void set_threads(Args& args, lb2_isa isa) {
  args.isa = isa;
  args.num_threads = static_cast<int32_t>(engine() % 5);
  if (engine() % 2) args.parallel_for = parallel_for;
}

// Plans and runs a call on every instruction set in every mode. Calls after(activation, isa) after each.
template <typename Args, typename After>
bool run_everywhere(int index, Args args, lb2_status (*plan_call)(const Args*, lb2_fused_plan*),
                    lb2_status (*forward)(const Args*), int64_t misaligned, const After& after) {
  const uint64_t chosen = engine();  // once, as calls draw too
  for (const lb2_activation activation : kCpuModes) {
    if (sampled() && (chosen >> activation & 1u)) continue;
    args.activation = activation;
    for (const lb2_isa isa : kIsas) {
      if (!serves(isa, activation)) continue;
      set_threads(args, isa);
      lb2_fused_plan plan = {};
      plan.struct_size = sizeof plan;
      if (failed_call(index, "plan", plan_call(&args, &plan))) return false;
      const Buffer workspace(plan.workspace_bytes, plan.workspace_bytes > 0 ? misaligned : 0);
      args.workspace = workspace.data;
      args.workspace_bytes = plan.workspace_bytes;
      if (failed_call(index, lb2_isa_name(isa), forward(&args))) return false;
      if (!after(activation, isa)) {
        std::fprintf(stderr, "  problem %d: %s, activation %d, dtype %d, m %ld, layers %ld, norm %d\n", index,
                     lb2_isa_name(isa), static_cast<int>(activation), static_cast<int>(args.dtype),
                     static_cast<long>(args.m), static_cast<long>(args.num_layers), args.norm != nullptr);
        return false;
      }
    }
  }
  return true;
}

// Compares outputs with float64, and with those of the first instruction set.
struct Checker {
  std::vector<std::vector<char>> first_results;
  lb2_activation of = -1;
  bool check(lb2_activation activation, const std::vector<Matrix>& outputs,
             const std::vector<std::vector<Doubles>>& expected, const Doubles& typical) {
    if (activation != of) first_results.clear();
    of = activation;
    const bool is_first = first_results.empty();
    for (size_t i = 0; i < outputs.size(); ++i) {
      const double error = error_of(outputs[i], expected[i], typical[i]);
      if (!(error <= allowed(activation, outputs[i].dtype))) {
        std::fprintf(stderr, "output %zu: relative error %.2e\n", i, error);
        return false;
      }
      if (is_first) {
        first_results.push_back(outputs[i].bytes());
        if (activation != LB2_ACTIVATION_INT8X2) add_to_digest(first_results.back());
      }
      if (outputs[i].bytes() == first_results[i]) continue;
      std::fprintf(stderr, "output %zu: bits differ between instruction sets\n", i);
      return false;
    }
    return true;
  }
};

lb2_dtype random_dtype() { return static_cast<lb2_dtype>(pick({LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16})); }

void add(Doubles& sum, const Doubles& more) {
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += more[i];
}

// The bits of a layer's own call on the input of a group.
std::vector<char> own_call(const lb2_grouped_args& group, const TestLayer& layer, const Matrix& like) {
  Matrix output(like.rows, like.cols, like.dtype, false, 0);
  output.stride = like.stride;
  output.data = Buffer(output.elements() * element_bytes(output.dtype), 0);
  output.fill();
  lb2_prepacked_args args = {};
  args.struct_size = sizeof args;
  args.layer = layer.data.data;
  args.layer_bytes = layer.bytes;
  args.bias = layer.view().bias;
  args.m = group.m;
  args.input = group.input;
  args.input_stride = group.input_stride;
  args.output = output.data.data;
  args.output_stride = output.stride;
  args.dtype = group.dtype;
  args.activation = LB2_ACTIVATION_INT16;
  lb2_prepacked_plan plan = {};
  plan.struct_size = sizeof plan;
  if (lb2_prepacked_plan_cpu(&args, &plan) != LB2_OK) std::abort();
  const Buffer workspace(plan.workspace_bytes, 0);
  args.workspace = workspace.data;
  args.workspace_bytes = plan.workspace_bytes;
  if (lb2_prepacked_forward_cpu(&args) != LB2_OK) std::abort();
  return output.bytes();
}

bool run_group(int index) {
  const int64_t misaligned = static_cast<int64_t>(engine() % 2);
  const lb2_dtype dtype = random_dtype();
  const int64_t m = pick({0, 1, 1, 2, 5, 9, 64}), k = pick({1, 15, 33, 100, 511, 730, 1500});
  const int64_t num_layers = pick({1, 1, 2, 3, LB2_MAX_LAYERS});
  std::vector<TestLayer> layers;
  std::vector<Matrix> outputs;
  std::vector<lb2_prepacked_layer> views;
  std::vector<lb2_rows> rows;
  for (int64_t i = 0; i < num_layers; ++i) {
    layers.emplace_back(k, pick({1, 15, 17, 64, 130, 300}), misaligned);
    outputs.emplace_back(m, layers.back().n, dtype, false, misaligned);
  }
  for (int64_t i = 0; i < num_layers; ++i) {
    views.push_back(layers[i].view());
    rows.push_back({outputs[i].data.data, outputs[i].stride});
  }
  const Matrix input(m, k, dtype, true, misaligned);
  const TestNorm norm(k, misaligned);
  const bool with_residual = num_layers == 1 && engine() % 2;
  const Matrix residual(m, layers[0].n, dtype, true, misaligned);
  lb2_grouped_args args = {};
  args.struct_size = sizeof args;
  args.layers = views.data();
  args.outputs = rows.data();
  args.num_layers = num_layers;
  args.m = m;
  args.norm = norm.pointer();
  args.input = input.data.data;
  args.input_stride = input.stride;
  args.dtype = dtype;
  if (with_residual) {
    args.residual = residual.data.data;
    args.residual_stride = residual.stride;
  }
  std::vector<std::vector<Doubles>> expected(layers.size());
  Doubles typical(layers.size(), 0.0);
  for (int64_t t = 0; t < m; ++t)
    for (size_t i = 0; i < layers.size(); ++i) {
      expected[i].push_back(layers[i].apply(norm.apply(input.row(t)), &typical[i]));
      if (with_residual) add(expected[i].back(), residual.row(t));
    }
  for (Matrix& output : outputs) output.fill();
  Checker checker;
  const auto after = [&](lb2_activation activation, lb2_isa) {
    if (!checker.check(activation, outputs, expected, typical)) return false;
    if (activation != LB2_ACTIVATION_INT16 || norm.used || with_residual) return true;
    for (size_t i = 0; i < layers.size(); ++i) {
      if (own_call(args, layers[i], outputs[i]) == outputs[i].bytes()) continue;
      std::fprintf(stderr, "layer %zu has other bits in its own call\n", i);
      return false;
    }
    return true;
  };
  return run_everywhere(index, args, lb2_grouped_plan_cpu, lb2_grouped_forward_cpu, misaligned, after);
}

bool run_mlp(int index) {
  const int64_t misaligned = static_cast<int64_t>(engine() % 2);
  const lb2_dtype dtype = random_dtype();
  const int64_t m = pick({0, 1, 1, 2, 5, 9, 64}), k = pick({1, 33, 100, 511, 730});
  const int64_t hidden = pick({1, 16, 77, 128, 129, 300, 800}), n = pick({1, 17, 64, 130});
  const bool halves = engine() % 3 == 0, gated = halves || engine() % 3 != 0;
  std::vector<TestLayer> layers;
  layers.emplace_back(k, halves ? 2 * hidden : hidden, misaligned);
  if (gated && !halves) layers.emplace_back(k, hidden, misaligned);
  layers.emplace_back(hidden, n, misaligned);
  std::vector<lb2_prepacked_layer> views;
  for (const TestLayer& layer : layers) views.push_back(layer.view());
  const Matrix input(m, k, dtype, true, misaligned), residual(m, n, dtype, true, misaligned);
  const TestNorm norm(k, misaligned);
  const bool with_residual = engine() % 2;
  std::vector<Matrix> outputs;
  outputs.emplace_back(m, n, dtype, false, misaligned);
  lb2_mlp_args args = {};
  args.struct_size = sizeof args;
  args.layers = views.data();
  args.num_layers = static_cast<int64_t>(views.size());
  args.m = m;
  args.norm = norm.pointer();
  args.input = input.data.data;
  args.input_stride = input.stride;
  args.output = outputs[0].data.data;
  args.output_stride = outputs[0].stride;
  args.dtype = dtype;
  args.function = static_cast<lb2_function>(engine() % 4);
  if (with_residual) {
    args.residual = residual.data.data;
    args.residual_stride = residual.stride;
  }
  std::vector<std::vector<Doubles>> expected(1);
  Doubles typical(1, 0.0);
  double unused = 0.0;
  for (int64_t t = 0; t < m; ++t) {
    const Doubles x = norm.apply(input.row(t));
    const Doubles gate = layers[0].apply(x, &unused);
    const Doubles up = gated && !halves
                           ? layers[1].apply(x, &unused)
                           : Doubles(gate.end() - static_cast<std::ptrdiff_t>(hidden), gate.end());
    Doubles z(static_cast<size_t>(hidden));
    for (size_t i = 0; i < z.size(); ++i) z[i] = function_of(args.function, gate[i]) * (gated ? up[i] : 1.0);
    expected[0].push_back(layers.back().apply(z, &typical[0]));
    if (with_residual) add(expected[0].back(), residual.row(t));
  }
  outputs[0].fill();
  Checker checker;
  const auto after = [&](lb2_activation activation, lb2_isa) {
    return checker.check(activation, outputs, expected, typical);
  };
  return run_everywhere(index, args, lb2_mlp_plan_cpu, lb2_mlp_forward_cpu, misaligned, after);
}

// Arguments that must be refused, with what the message must say.
bool refuses() {
  const TestLayer gate(40, 64, 0), up(40, 64, 0), down(64, 8, 0), narrow(39, 64, 0);
  const lb2_prepacked_layer views[3] = {gate.view(), up.view(), down.view()};
  const lb2_prepacked_layer ups[2] = {gate.view(), narrow.view()};
  const std::vector<float> x(40, 1.0f);
  std::vector<float> y(64), workspace_memory(1 << 20);
  const lb2_norm good = {x.data(), LB2_FLOAT32, 1e-5f, 0.0f};
  lb2_norm bad = good;
  lb2_rows rows[2] = {{y.data(), 64}, {y.data(), 64}};
  int failures = 0;
  const auto expect = [&](lb2_status status, const char* text) {
    if (status == LB2_ERROR_INVALID_ARGUMENT && std::strstr(lb2_last_error(), text) != nullptr) return;
    std::fprintf(stderr, "expected '%s', got %d: %s\n", text, static_cast<int>(status), lb2_last_error());
    ++failures;
  };
  lb2_mlp_args mlp = {};
  mlp.struct_size = sizeof mlp;
  mlp.layers = views;
  mlp.num_layers = 3;
  mlp.m = 1;
  mlp.input = x.data();
  mlp.output = y.data();
  mlp.norm = &good;
  mlp.workspace = workspace_memory.data();
  mlp.workspace_bytes = static_cast<int64_t>(workspace_memory.size() * 4);
  if (failed_call(0, "mlp", lb2_mlp_forward_cpu(&mlp))) return false;
  const auto with_mlp = [&](auto change, const char* text) {
    lb2_mlp_args args = mlp;
    bad = good;
    change(args);
    expect(lb2_mlp_forward_cpu(&args), text);
  };
  expect(lb2_mlp_forward_cpu(nullptr), "args must not be NULL");
  with_mlp([](lb2_mlp_args& a) { a.struct_size = 8; }, "sizeof(lb2_mlp_args)");
  with_mlp([](lb2_mlp_args& a) { a.num_layers = 1; }, "num_layers must be between 2 and 3, got 1");
  with_mlp([](lb2_mlp_args& a) { a.num_layers = 4; }, "num_layers must be between 2 and 3, got 4");
  with_mlp([](lb2_mlp_args& a) { a.layers = nullptr; }, "layers must not be NULL");
  with_mlp([](lb2_mlp_args& a) { a.num_layers = 2; }, "layers[0] must have n = 40, k of the last layer, or");
  with_mlp(
      [](lb2_mlp_args& a) {
        a.layers += 1;
        a.num_layers = 2;
        a.function = 4;
      },
      "function must be");
  with_mlp([](lb2_mlp_args& a) { a.activation = 5; }, "activation must be");
  with_mlp([](lb2_mlp_args& a) { a.dtype = LB2_INT8; }, "dtype must be");
  with_mlp([](lb2_mlp_args& a) { a.input = nullptr; }, "input must not be NULL");
  with_mlp([](lb2_mlp_args& a) { a.output = nullptr; }, "output must not be NULL");
  with_mlp([](lb2_mlp_args& a) { a.workspace_bytes = 64; }, "workspace_bytes must be >=");
  with_mlp(
      [&](lb2_mlp_args& a) {
        bad.weight = nullptr;
        a.norm = &bad;
      },
      "norm->weight must not be NULL");
  with_mlp(
      [&](lb2_mlp_args& a) {
        bad.dtype = LB2_INT8;
        a.norm = &bad;
      },
      "norm->dtype must be");
  with_mlp(
      [&](lb2_mlp_args& a) {
        bad.eps = -1.0f;
        a.norm = &bad;
      },
      "norm->eps must be finite and >= 0");
  with_mlp(
      [&](lb2_mlp_args& a) {
        bad.offset = INFINITY;
        a.norm = &bad;
      },
      "norm->offset must be finite");
  lb2_fused_plan plan = {};
  expect(lb2_mlp_plan_cpu(&mlp, &plan), "plan->struct_size must equal");
  expect(lb2_mlp_plan_cpu(&mlp, nullptr), "plan must not be NULL");

  lb2_grouped_args group = {};
  group.struct_size = sizeof group;
  group.layers = views;
  group.outputs = rows;
  group.num_layers = 2;
  group.m = 1;
  group.input = x.data();
  group.workspace = workspace_memory.data();
  group.workspace_bytes = mlp.workspace_bytes;
  if (failed_call(0, "group", lb2_grouped_forward_cpu(&group))) return false;
  const auto with_group = [&](auto change, const char* text) {
    lb2_grouped_args args = group;
    change(args);
    expect(lb2_grouped_forward_cpu(&args), text);
  };
  with_group([](lb2_grouped_args& a) { a.num_layers = 0; }, "num_layers must be between 1 and 8, got 0");
  with_group([](lb2_grouped_args& a) { a.num_layers = 9; }, "num_layers must be between 1 and 8, got 9");
  with_group([&](lb2_grouped_args& a) { a.layers = ups; },
             "layers[1] must have k = 40 like layers[0], got 39");
  with_group([&](lb2_grouped_args& a) { a.residual = x.data(); },
             "residual must be NULL unless num_layers is 1");
  with_group([](lb2_grouped_args& a) { a.outputs = nullptr; }, "outputs must not be NULL");
  rows[1].data = nullptr;
  with_group([](lb2_grouped_args&) {}, "outputs[1] must not be NULL");
  return failures == 0;
}

}  // namespace

int main(int argc, char** argv) {
  int failed = !refuses();
  failed += run_problems(argc, argv, problem_count(90), run_group);
  failed += run_problems(argc, argv, problem_count(90), run_mlp);
  return failed != 0;
}
