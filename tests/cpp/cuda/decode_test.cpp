// The CUDA kernels executed on the host, instance by instance, against a float64 reference: random
// small problems with ragged tails, misaligned words, several paths, and garbage in pad bits. Out-of-bounds
// accesses are AddressSanitizer's to find; shared memory and workspace start as NaN, so that what was not
// written shows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/call.h"
#include "cuda/params.h"

namespace {

// Signs [rows, z.size()] times the binarized z: its signs times the mean magnitude of their slice. Slices
// count in integers, as a count of zero must give zero for the sign that is taken of it next.
std::vector<double> multiply_signs(const std::vector<double>& signs, size_t rows,
                                   const std::vector<double>& z) {
  std::vector<double> out(rows, 0.0);
  for (size_t begin = 0; begin < z.size(); begin += lb2::cuda::kSliceCols) {
    const size_t end = std::min(z.size(), begin + lb2::cuda::kSliceCols);
    double mean = 0.0;
    for (size_t i = begin; i < end; ++i) mean += std::fabs(z[i]) / static_cast<double>(end - begin);
    for (size_t r = 0; r < rows; ++r) {
      int count = 0;
      for (size_t c = begin; c < end; ++c) count += (signs[r * z.size() + c] < 0.0) == (z[c] < 0.0) ? 1 : -1;
      out[r] += count * mean;
    }
  }
  return out;
}

// Replaces the expected results by those of binarized activations and latents.
void expect_signs(Problem& problem) {
  for (int64_t t = 0; t < problem.m; ++t)
    for (int64_t i = 0; i < problem.n; ++i) {
      const float* bias = problem.bias_data();
      float value = 0.0f;
      if (bias != nullptr) std::memcpy(&value, bias + i, 4);
      problem.expected[static_cast<size_t>(t * problem.n + i)] = value;
    }
  for (int64_t t = 0; t < problem.m; ++t)
    for (const Path& path : problem.paths) {
      std::vector<double> z(static_cast<size_t>(problem.k));
      for (size_t c = 0; c < z.size(); ++c)
        z[c] =
            decode(problem.dtype, problem.input.data + (t * problem.input_stride + static_cast<int64_t>(c)) *
                                                           problem.element) *
            path.in_scale[c];
      z = multiply_signs(path.v, static_cast<size_t>(path.rank), z);
      if (!problem.single_stage) {
        for (size_t r = 0; r < z.size(); ++r) z[r] *= path.latent_scale[r];
        z = multiply_signs(path.u, static_cast<size_t>(problem.n), z);
      }
      for (int64_t i = 0; i < problem.n; ++i)
        problem.expected[static_cast<size_t>(t * problem.n + i)] +=
            z[static_cast<size_t>(i)] * path.out_scale[static_cast<size_t>(i)];
    }
}

// Problems that fit emulation, with the few shapes that matter: one slice and several, ragged tails, and more
// tokens than a tile.
struct Case {
  lb2_activation activation;
  lb2_cuda_device device;
  lb2_cuda_tuning tuning;  // all zero for every second problem: what planning chooses
};

Case random_case() {
  Case result = {};
  result.activation = static_cast<lb2_activation>(1 + engine() % 5);
  result.device.struct_size = sizeof(lb2_cuda_device);
  result.tuning.struct_size = sizeof(lb2_cuda_tuning);
  result.device.capability = pick({80, 86, 89, 90, 100, 120});
  // Few SMs make single tall blocks, many make splits.
  result.device.multiprocessors = static_cast<int32_t>(pick({1, 4, 132}));
  result.device.shared_bytes = pick({48 * 1024, 100 * 1024, 227 * 1024});
  if (engine() % 2 == 0)
    for (int32_t& row_warps : result.tuning.row_warps)
      row_warps = static_cast<int32_t>(pick({0, 1, 2, 4, 8}));
  result.tuning.splits = static_cast<int32_t>(pick({0, 0, 1, 3, 5, 6, 9}));
  result.tuning.max_chunk = result.tuning.row_warps[0] != 0 ? static_cast<int32_t>(pick({0, 1, 2})) : 0;
  return result;
}

// One layer, or every third time several on the input of the first.
bool run_problem(int index, int only_mode) {
  std::vector<Problem> problems;
  problems.reserve(3);
  problems.emplace_back(false, 4, 1200, 4700);
  const size_t count = problems[0].num_paths <= 3 && index % 3 == 2 ? 2 + engine() % 2 : 1;
  while (problems.size() < count) problems.emplace_back(false, 4, 96, 0, problems.data());
  Case chosen = random_case();
  if (only_mode > 0) chosen.activation = only_mode;
  if (chosen.activation == LB2_ACTIVATION_SIGN)
    for (Problem& problem : problems) expect_signs(problem);
  const std::vector<lb2_linear_args> layers = layers_of(problems);
  const Problem& first = problems[0];
  const int64_t slices =
      first.single_stage ? 1 : (first.k + lb2::cuda::kSliceCols - 1) / lb2::cuda::kSliceCols;
  chosen.tuning.splits = static_cast<int32_t>(std::min<int64_t>(chosen.tuning.splits, slices));
  const lb2_cuda_plan plan = make_plan(layers, chosen.activation, chosen.device, &chosen.tuning);
  std::vector<std::vector<char>> results;
  return gives_expected(problems, layers, plan,
                        {lb2::cuda::Order::kForward, lb2::cuda::Order::kReverse, lb2::cuda::Order::kShuffled},
                        index, &results);
}

// A token's result is the same bits alone and among others, also past a round of launches, and a token that
// is not finite spoils none but its own. The GPU has too little shared memory for the GEMM.
bool run_batch(lb2_activation activation) {
  const int64_t m = 133, k = 1100, n = 40;
  Setup setup(m, k, n, 24);
  setup.device.shared_bytes = 48 * 1024;
  const std::vector<float> all = setup.run(activation, 0, m);
  return same_alone(setup, activation, {1, 3, 11, 16, 21}, all) && spoils_its_own(setup, activation, all);
}

// Powers of two come out as they go in, however large or small, and zero gives zero.
bool run_scales(lb2_activation activation) {
  const int64_t k = 600, n = 24;
  Setup setup(2, k, n, 16);
  for (int64_t c = 0; c < k; c += 50) setup.x[static_cast<size_t>(c)] *= 50.0f;  // outlier channels
  const std::vector<float> plain = setup.run(activation, 0, 1);
  for (const int exponent : {-100, -30, 30, 80}) {
    Setup scaled = Setup(2, k, n, 16);
    scaled.v = copy_out(std::vector<char>(setup.v.data, setup.v.data + 16 * lb2_words_per_row(k) * 4), 0);
    scaled.u = copy_out(std::vector<char>(setup.u.data, setup.u.data + n * 4), 0);
    scaled.path.v = reinterpret_cast<const int32_t*>(scaled.v.data);
    scaled.path.u = reinterpret_cast<const int32_t*>(scaled.u.data);
    scaled.in_scale = setup.in_scale;
    scaled.latent_scale = setup.latent_scale;
    scaled.out_scale = setup.out_scale;
    for (size_t i = 0; i < setup.x.size(); ++i) scaled.x[i] = std::ldexp(setup.x[i], exponent);
    const std::vector<float> y = scaled.run(activation, 0, 1);
    for (int64_t i = 0; i < n; ++i)
      if (std::ldexp(y[static_cast<size_t>(i)], -exponent) != plain[static_cast<size_t>(i)])
        return failed("scaling x by a power of two does not scale y by it", activation);
  }
  std::fill(setup.x.begin(), setup.x.end(), 0.0f);
  for (const float value : setup.run(activation, 0, 2))
    if (value != 0.0f) return failed("zero does not give zero", activation);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : problem_count(60);
  const int only_mode = argc > 2 ? std::atoi(argv[2]) : 0;
  for (int i = 0; i < count; ++i)
    if (!run_problem(i, only_mode)) return EXIT_FAILURE;
  for (lb2_activation mode = LB2_ACTIVATION_EXACT; mode <= LB2_ACTIVATION_FLOAT16; ++mode)
    if (!run_batch(mode) || !run_scales(mode)) return EXIT_FAILURE;
  std::printf("%d problems passed\n", count);
  return EXIT_SUCCESS;
}
