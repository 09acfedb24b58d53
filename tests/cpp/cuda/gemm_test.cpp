// The CUDA GEMM executed on the host against a float64 reference: every mode and tile over random small
// problems with ragged tails, misaligned words, several paths, shared first stages and garbage in pad bits;
// and what must hold of its bits. As decode_test.cpp, whose words on out-of-bounds accesses hold here.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/call.h"
#include "cuda/gemm/sizes.h"

namespace {

using lb2::cuda::GemmTile;
using lb2::cuda::kGemmTiles;

constexpr lb2_activation kModes[] = {LB2_ACTIVATION_EXACT, LB2_ACTIVATION_FLOAT16, LB2_ACTIVATION_INT8};

// A tile of the mode, `skip` after the first.
GemmTile tile_of(lb2_activation activation, uint64_t skip) {
  std::vector<GemmTile> tiles;
  for (const GemmTile& tile : kGemmTiles)
    if (lb2::cuda::has_gemm_tile(activation, tile.rows, tile.tokens)) tiles.push_back(tile);
  return tiles[skip % tiles.size()];
}

bool is_gemm_of(const lb2_cuda_plan& plan, lb2_activation activation) {
  return plan.activation == activation && plan.num_launches >= 2 &&
         plan.launches[plan.num_launches - 1].kind == LB2_CUDA_GEMM;
}

// One layer, or every third time two on the input of the first.
bool run_problem(int index) {
  const lb2_activation activation = kModes[index % 3];
  std::vector<Problem> problems;
  problems.reserve(2);
  problems.emplace_back(false, 4, 600, 0, nullptr, std::initializer_list<int64_t>{17, 18, 31, 33, 40, 70});
  if (problems[0].num_paths <= 3 && index / 3 % 3 == 2)
    problems.emplace_back(false, 4, 96, 0, problems.data());
  lb2_cuda_device device = {sizeof(lb2_cuda_device), 0, 0, 0};
  device.capability = static_cast<int32_t>(pick({80, 86, 89, 90, 100, 120}));
  device.multiprocessors = static_cast<int32_t>(pick({1, 132}));
  device.shared_bytes = pick({99 * 1024, 227 * 1024});
  lb2_cuda_tuning tuning = {sizeof(lb2_cuda_tuning), {0, 0}, 0, 0, 0, {0, 0}, {0, 0}, -1};
  const int64_t slices = problems[0].single_stage ? 1 : (problems[0].k + 511) / 512;
  if (index % 4 != 0) {
    for (int stage = 0; stage < 2; ++stage) {
      const GemmTile tile = tile_of(activation, static_cast<uint64_t>(index / 3 + stage));
      tuning.gemm_rows[stage] = tile.rows;
      tuning.gemm_tokens[stage] = tile.tokens;
    }
    tuning.splits = static_cast<int32_t>(std::min(slices, pick({0, 1, 2, 5})));
  }
  std::vector<lb2_linear_args> layers = layers_of(problems);
  const lb2_cuda_plan plan = make_plan(layers, activation, device, &tuning);
  if (!is_gemm_of(plan, activation)) return failed("the plan is not that of a GEMM", activation);
  std::vector<std::vector<char>> results;
  if (!gives_expected(problems, layers, plan, {lb2::cuda::Order::kForward, lb2::cuda::Order::kShuffled},
                      index, &results))
    return false;
  if (problems.size() == 1) return true;
  // What a layer gives in a group it gives alone.
  const size_t bytes = results[1].size();
  const Buffer output = copy_out(std::vector<char>(bytes, 0x5A), 0);
  layers[1].output = output.data;
  const lb2_cuda_tuning none = {sizeof(lb2_cuda_tuning), {0, 0}, 0, 0, 0, {0, 0}, {0, 0}, -1};
  const lb2_cuda_plan alone = make_plan({layers[1]}, activation, device, &none);
  if (!forward({layers[1]}, alone, lb2::cuda::Order::kForward)) return false;
  if (std::memcmp(output.data, results[1].data(), bytes) == 0) return true;
  return failed("a layer's result depends on its group", activation);
}

// A token's result is the same bits in every tile, split or not, and among other tokens, however many; and a
// token that is not finite spoils none but its own.
bool run_bits(lb2_activation activation) {
  const int64_t m = 41, k = 1100, n = 70, rank = 520;
  Setup setup(m, k, n, rank);
  const std::vector<float> all = setup.run(activation, 0, m);
  for (uint64_t i = 0; i < 4; ++i)
    for (const int32_t splits : {1, 2, 3}) {
      const GemmTile first = tile_of(activation, i), last = tile_of(activation, i + 1);
      setup.tuning = {sizeof(lb2_cuda_tuning),     {0, 0}, splits, 0, 0, {first.rows, last.rows},
                      {first.tokens, last.tokens}, -1};
      const std::vector<float> other = setup.run(activation, 0, m);
      if (!same_bits(other.data(), all.data(), m * n))
        return failed("tiles or splits change the result", activation);
    }
  setup.tuning = {sizeof(lb2_cuda_tuning), {0, 0}, 0, 0, 0, {0, 0}, {0, 0}, -1};
  return same_alone(setup, activation, {17, 24, 33}, all) && spoils_its_own(setup, activation, all);
}

// In int8 the conversion is that of the decode kernels and sums are exact: up to the order in which slices
// add up, the same results. So it is in float16, but for sums of a slice.
bool run_beside_decode(lb2_activation activation) {
  const int64_t m = 20, k = 1100, n = 40;
  Setup setup(m, k, n, 24);
  const std::vector<float> gemm = setup.run(activation, 0, m);
  setup.device.shared_bytes = 48 * 1024;
  const std::vector<float> decode = setup.run(activation, 0, m);
  double difference = 0.0, norm = 0.0;
  for (size_t i = 0; i < gemm.size(); ++i) {
    difference += std::pow(static_cast<double>(gemm[i]) - decode[i], 2);
    norm += std::pow(static_cast<double>(decode[i]), 2);
  }
  // One latent that rounds to another integer of 8 bits is a change of 1 in 127.
  const double most = activation == LB2_ACTIVATION_INT8    ? 1e-3
                      : activation == LB2_ACTIVATION_EXACT ? 1e-6
                                                           : 5e-5;
  if (std::sqrt(difference / norm) <= most) return true;
  std::fprintf(stderr, "difference %.2e\n", std::sqrt(difference / norm));
  return failed("the GEMM is far from the decode kernels", activation);
}

// Powers of two come out as they go in, however large or small, and zero gives zero.
bool run_scales(lb2_activation activation) {
  const int64_t m = 17, k = 600, n = 24;
  Setup setup(m, k, n, 16);
  for (int64_t c = 0; c < m * k; c += 50) setup.x[static_cast<size_t>(c)] *= 50.0f;  // outliers
  const std::vector<float> x = setup.x, plain = setup.run(activation, 0, m);
  for (const int exponent : {-100, -30, 30, 80}) {
    for (size_t i = 0; i < x.size(); ++i) setup.x[i] = std::ldexp(x[i], exponent);
    const std::vector<float> y = setup.run(activation, 0, m);
    for (size_t i = 0; i < y.size(); ++i)
      if (std::ldexp(y[i], -exponent) != plain[i])
        return failed("scaling x by a power of two does not scale y by it", activation);
  }
  std::fill(setup.x.begin(), setup.x.end(), 0.0f);
  for (const float value : setup.run(activation, 0, m))
    if (value != 0.0f) return failed("zero does not give zero", activation);
  return true;
}

// More tokens than a round of launches, which ends within a tile.
bool run_rounds() {
  const int64_t m = 4096 + 21, k = 20, n = 9;
  Setup setup(m, k, n, 8);
  setup.guarded = false;
  const std::vector<float> all = setup.run(LB2_ACTIVATION_FLOAT16, 0, m);
  if (lb2::cuda::host::runtime().launches.size() != 8)
    return failed("4117 tokens are two rounds of four launches", LB2_ACTIVATION_FLOAT16);
  for (const int64_t first : {int64_t{0}, m / 2, m - 17}) {
    const std::vector<float> some = setup.run(LB2_ACTIVATION_FLOAT16, first, 17);
    if (!same_bits(some.data(), all.data() + first * n, 17 * n))
      return failed("a token's result depends on its round", LB2_ACTIVATION_FLOAT16);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : problem_count(36);
  for (int i = 0; i < count; ++i)
    if (!run_problem(i)) return EXIT_FAILURE;
  for (const lb2_activation mode : kModes)
    if (!skips_sweep(mode) && (!run_bits(mode) || !run_beside_decode(mode) || !run_scales(mode)))
      return EXIT_FAILURE;
  if (!run_rounds()) return EXIT_FAILURE;
  std::printf("%d problems passed\n", count);
  return EXIT_SUCCESS;
}
