// Planning and calling a layer on a GPU of the tests' own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda_host/cuda_runtime.h"
#include "littlebit2/cuda.h"
#include "random_problem.h"

// Whether a run leaves out the sweep over a mode that random problems reach too.
inline bool skips_sweep(lb2_activation mode) { return sampled() && mode != LB2_ACTIVATION_FLOAT16; }

// Relative Frobenius error of a mode, which is random from output to output: one alone, or the norm of a few,
// lies further out.
inline double mode_tolerance(lb2_activation activation, int64_t outputs) {
  const double many = activation == LB2_ACTIVATION_EXACT  ? 2e-6
                      : activation == LB2_ACTIVATION_INT8 ? 2e-2
                                                          : 5e-4;
  return many * (1.0 + 3.0 / std::sqrt(static_cast<double>(std::max<int64_t>(outputs, 1))));
}

// Calls the layers on the host, on the GPU that the plan was made for; the workspace starts as NaN. Guarding
// what a kernel may not touch before it has waited takes time with the size of it.
inline bool forward(std::vector<lb2_linear_args> layers, const lb2_cuda_plan& plan, lb2::cuda::Order order,
                    bool guarded = true) {
  lb2::cuda::host::Runtime& gpu = lb2::cuda::host::runtime();
  gpu.capability = static_cast<int>(plan.device.capability);
  gpu.multiprocessors = static_cast<int>(plan.device.multiprocessors);
  gpu.shared_bytes = static_cast<int>(plan.device.shared_bytes);
  // Properties of a GPU are asked for once: another kind is another GPU.
  gpu.current = static_cast<int>(plan.device.capability * 4 + plan.device.shared_bytes / (64 * 1024));
  gpu.devices = gpu.current + 1;
  gpu.order = order;
  constexpr int64_t kGuard = 64;
  constexpr char kCanary = 0x3C;
  const Buffer memory(plan.workspace_bytes + 2 * kGuard, false);
  std::memset(memory.data, kCanary, static_cast<size_t>(plan.workspace_bytes + 2 * kGuard));
  char* workspace = memory.data + kGuard;
  std::memset(workspace, 0xFF, static_cast<size_t>(plan.workspace_bytes));
  // A call that needs no workspace may pass none.
  layers[0].workspace = plan.workspace_bytes > 0 ? workspace : nullptr;
  layers[0].workspace_bytes = plan.workspace_bytes;
  gpu.launches.clear();
  gpu.round = static_cast<size_t>(plan.num_launches);
  gpu.written = {{workspace, static_cast<size_t>(plan.workspace_bytes)}};
  gpu.layer.clear();
  for (const lb2_linear_args& args : layers) {
    const size_t element = args.dtype == LB2_FLOAT32 ? 4 : 2;
    const auto bytes = [&](int64_t stride, int64_t cols) {
      return static_cast<size_t>((args.m - 1) * stride + cols) * element;
    };
    if (args.m > 0 && &args == layers.data())
      gpu.written.push_back({args.input, bytes(args.input_stride, args.k)});
    if (args.m > 0) gpu.written.push_back({args.output, bytes(args.output_stride, args.n)});
    for (int64_t p = 0; p < args.num_paths; ++p) {
      const lb2_path& path = args.paths[p];
      gpu.layer.push_back({path.v, static_cast<size_t>(lb2_words_per_row(args.k)) * 4});
      gpu.layer.push_back({path.in_scale, static_cast<size_t>(args.k) * 4});
      gpu.layer.push_back({path.out_scale, static_cast<size_t>(args.n) * 4});
    }
  }
  if (!guarded) {
    gpu.written.clear();
    gpu.layer.clear();
  }
  const lb2_status status =
      layers.size() == 1
          ? lb2_linear_forward_cuda(layers.data(), &plan, nullptr)
          : lb2_grouped_forward_cuda(layers.data(), static_cast<int64_t>(layers.size()), &plan, nullptr);
  if (status != LB2_OK) {
    std::fprintf(stderr, "%s\n", lb2_last_error());
    return false;
  }
  for (int64_t i = 0; i < kGuard; ++i)
    if (memory.data[i] != kCanary || workspace[plan.workspace_bytes + i] != kCanary) {
      std::fprintf(stderr, "something was written before or past the workspace\n");
      return false;
    }
  return true;
}

inline std::vector<lb2_layer_shape> shapes_of(const std::vector<lb2_linear_args>& layers) {
  std::vector<lb2_layer_shape> shapes(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    shapes[i].struct_size = sizeof shapes[i];
    if (lb2_linear_shape(&layers[i], &shapes[i]) == LB2_OK) continue;
    std::fprintf(stderr, "shape: %s\n", lb2_last_error());
    std::abort();
  }
  return shapes;
}

inline lb2_cuda_plan make_plan(const std::vector<lb2_linear_args>& layers, lb2_activation activation,
                               const lb2_cuda_device& device, const lb2_cuda_tuning* tuning) {
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  const std::vector<lb2_layer_shape> shapes = shapes_of(layers);
  const int64_t m = layers[0].m;
  const lb2_dtype dtype = layers[0].dtype;
  const lb2_status status =
      shapes.size() == 1 ? lb2_linear_plan_cuda(shapes.data(), m, dtype, activation, &device, tuning, &plan)
                         : lb2_grouped_plan_cuda(shapes.data(), static_cast<int64_t>(shapes.size()), m, dtype,
                                                 activation, &device, tuning, &plan);
  if (status == LB2_OK) return plan;
  std::fprintf(stderr, "plan: %s\n", lb2_last_error());
  std::abort();
}

// Layers of a call on the input of the first problem, outputs apart.
inline std::vector<lb2_linear_args> layers_of(const std::vector<Problem>& problems) {
  std::vector<lb2_linear_args> layers;
  for (const Problem& problem : problems) {
    lb2_linear_args args = problem.layer_args();
    args.m = problem.m;
    args.bias = problem.bias_data();
    args.input = problems[0].input.data;
    args.input_stride = problem.input_stride;
    args.output_stride = problem.output_stride;
    args.dtype = problem.dtype;
    layers.push_back(args);
  }
  return layers;
}

// Calls the layers in each of the orders; every one must give what is expected, and all the same bits, which
// are left in `results`, by layer.
inline bool gives_expected(const std::vector<Problem>& problems, std::vector<lb2_linear_args> layers,
                           const lb2_cuda_plan& plan, std::initializer_list<lb2::cuda::Order> orders,
                           int index, std::vector<std::vector<char>>* results) {
  results->assign(problems.size(), {});
  for (const lb2::cuda::Order order : orders) {
    std::vector<Buffer> outputs;
    for (size_t i = 0; i < problems.size(); ++i) {
      const size_t bytes = static_cast<size_t>(problems[i].output_elements() * problems[i].element);
      outputs.push_back(copy_out(std::vector<char>(bytes, 0x5A), 0));
      layers[i].output = outputs[i].data;
    }
    if (!forward(layers, plan, order)) return false;
    for (size_t i = 0; i < problems.size(); ++i) {
      const Problem& problem = problems[i];
      const double error = problem.error_of(outputs[i].data);
      if (!(error <= tolerance(problem.dtype) + mode_tolerance(plan.activation, problem.m * problem.n))) {
        const lb2_cuda_launch &first = plan.launches[0], &last = plan.launches[plan.num_launches - 1];
        std::fprintf(
            stderr,
            "problem %d: layer %zu of %zu, activation %d on sm_%d with %d SMs, %d launches, first of "
            "%d x %d, last of %d x %d blocks, tile %d x %d: relative error %.2e\n",
            index, i, problems.size(), static_cast<int>(plan.activation),
            static_cast<int>(plan.device.capability), static_cast<int>(plan.device.multiprocessors),
            static_cast<int>(plan.num_launches), static_cast<int>(first.grid_x),
            static_cast<int>(first.grid_y), static_cast<int>(last.grid_x), static_cast<int>(last.grid_y),
            static_cast<int>(last.row_tile), static_cast<int>(last.token_tile), error);
        problem.describe();
        return false;
      }
      std::vector<char> result(outputs[i].data,
                               outputs[i].data + problem.output_elements() * problem.element);
      std::vector<char>& known = (*results)[i];
      if (known.empty()) known = result;
      if (result != known) {
        std::fprintf(stderr, "problem %d: the order of threads and blocks changes the result\n", index);
        problem.describe();
        return false;
      }
    }
  }
  return true;
}

// One layer and activations of a shape, everything contiguous, for the properties below.
struct Setup {
  int64_t m, k, n, rank;
  std::vector<double> dense;
  Buffer v, u;
  std::vector<float> in_scale, latent_scale, out_scale, x;
  lb2_path path = {};
  lb2_linear_args args = {};
  lb2_cuda_device device = {sizeof(lb2_cuda_device), 90, 132, 232448};
  bool guarded = true;
  // The launches of each stage, unless a test asks for one of both.
  lb2_cuda_tuning tuning = {sizeof(lb2_cuda_tuning), {0, 0}, 0, 0, 0, {0, 0}, {0, 0}, -1};

  Setup(int64_t tokens, int64_t in_features, int64_t out_features, int64_t latents)
      : m(tokens),
        k(in_features),
        n(out_features),
        rank(latents),
        v(random_words(rank, k, lb2_words_per_row(k), 0, dense)),
        u(random_words(n, rank, lb2_words_per_row(rank), 0, dense)),
        in_scale(random_floats(k)),
        latent_scale(random_floats(rank)),
        out_scale(random_floats(n)),
        x(random_floats(m * k)) {
    path.v = reinterpret_cast<const int32_t*>(v.data);
    path.v_stride = lb2_words_per_row(k);
    path.u = reinterpret_cast<const int32_t*>(u.data);
    path.u_stride = lb2_words_per_row(rank);
    path.rank = rank;
    args.struct_size = sizeof args;
    args.k = k;
    args.n = n;
    args.paths = &path;
    args.num_paths = 1;
    args.dtype = LB2_FLOAT32;
  }

  // Outputs of the tokens [first, first + count).
  std::vector<float> run(lb2_activation activation, int64_t first, int64_t count) {
    std::vector<float> y(static_cast<size_t>(count * n));
    path.in_scale = in_scale.data();
    path.latent_scale = latent_scale.data();
    path.out_scale = out_scale.data();
    args.m = count;
    args.input = x.data() + first * k;
    args.input_stride = k;
    args.output = y.data();
    args.output_stride = n;
    const lb2_cuda_plan plan = make_plan({args}, activation, device, &tuning);
    if (!forward({args}, plan, lb2::cuda::Order::kForward, guarded)) std::abort();
    return y;
  }
};

inline bool same_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * 4) == 0;
}

inline bool failed(const char* what, lb2_activation activation) {
  std::fprintf(stderr, "activation %d: %s\n", static_cast<int>(activation), what);
  return false;
}

// The last `count` of the tokens alone have the bits that they have among `all`.
inline bool same_alone(Setup& setup, lb2_activation activation, std::initializer_list<int64_t> counts,
                       const std::vector<float>& all) {
  for (const int64_t count : counts) {
    const int64_t first = setup.m - count;
    const std::vector<float> some = setup.run(activation, first, count);
    if (!same_bits(some.data(), all.data() + first * setup.n, count * setup.n))
      return failed("a token's result depends on the others", activation);
  }
  return true;
}

// A token that is not finite has no finite result, and changes no other's, which are `all`.
inline bool spoils_its_own(Setup& setup, lb2_activation activation, const std::vector<float>& all) {
  for (const float value : {NAN, INFINITY}) {
    setup.x[static_cast<size_t>(5 * setup.k + 700)] = value;
    const std::vector<float> spoilt = setup.run(activation, 0, setup.m);
    for (int64_t t = 0; t < setup.m; ++t)
      for (int64_t i = 0; i < setup.n; ++i) {
        const size_t at = static_cast<size_t>(t * setup.n + i);
        if (t == 5 && std::isfinite(spoilt[at]))
          return failed("a token that is not finite has a finite result", activation);
        if (t != 5 && !same_bits(&spoilt[at], &all[at], 1))
          return failed("a token that is not finite changes another", activation);
      }
  }
  return true;
}
