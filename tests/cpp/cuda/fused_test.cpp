// The CUDA kernel of both stages executed on the host, clusters included, against a float64 reference and the
// GEMM, whose bits it must give: every mode and cluster over random small problems, as in gemm_test.cpp.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/call.h"
#include "cuda/fused/params.h"

namespace {

constexpr lb2_activation kModes[] = {LB2_ACTIVATION_EXACT, LB2_ACTIVATION_FLOAT16, LB2_ACTIVATION_INT8};
constexpr lb2_cuda_device kHopper = {sizeof(lb2_cuda_device), 90, 132, 227 * 1024};

lb2_cuda_tuning tuning_of(int32_t fused) {
  return {sizeof(lb2_cuda_tuning), {0, 0}, 0, 0, 0, {0, 0}, {0, 0}, fused};
}

// A plan of the kernel in clusters of so many blocks; false where there is no room for it.
bool plan_fused(const std::vector<lb2_linear_args>& layers, lb2_activation activation,
                const lb2_cuda_device& device, int32_t blocks, lb2_cuda_plan* plan) {
  const lb2_cuda_tuning tuning = tuning_of(blocks);
  *plan = {};
  plan->struct_size = sizeof *plan;
  const lb2_status status =
      lb2_grouped_plan_cuda(shapes_of(layers).data(), static_cast<int64_t>(layers.size()), layers[0].m,
                            layers[0].dtype, activation, &device, &tuning, plan);
  return status == LB2_OK;
}

bool is_fused(const lb2_cuda_plan& plan, int32_t blocks) {
  return plan.num_launches == 1 && plan.launches[0].kind == LB2_CUDA_FUSED &&
         plan.launches[0].grid_y == blocks && plan.workspace_bytes == 0;
}

// One layer, or every third time two on the input of the first; `ran` counts those that there was room for.
bool run_problem(int index, int* ran) {
  const lb2_activation activation = kModes[index % 3];
  std::vector<Problem> problems;
  problems.reserve(2);
  problems.emplace_back(false, 4, 560, 0, nullptr, std::initializer_list<int64_t>{17, 18, 31, 33, 40, 70});
  if (problems[0].num_paths <= 3 && index / 3 % 3 == 2)
    problems.emplace_back(false, 4, 96, 0, problems.data());
  const int32_t blocks = static_cast<int32_t>(pick({1, 2, 4, 8}));
  lb2_cuda_device device = kHopper;
  device.capability = static_cast<int32_t>(blocks > 1 ? pick({90, 100, 120}) : pick({80, 86, 89, 90, 120}));
  device.multiprocessors = static_cast<int32_t>(pick({blocks, 132}));
  device.shared_bytes = pick({99 * 1024, 227 * 1024, 227 * 1024});
  const std::vector<lb2_linear_args> layers = layers_of(problems);
  lb2_cuda_plan plan;
  if (!plan_fused(layers, activation, device, blocks, &plan)) return true;
  ++*ran;
  if (!is_fused(plan, blocks)) return failed("the plan is not that of one launch", activation);
  std::vector<std::vector<char>> results, other;
  if (!gives_expected(problems, layers, plan, {lb2::cuda::Order::kForward, lb2::cuda::Order::kShuffled},
                      index, &results))
    return false;
  const lb2_cuda_tuning never = tuning_of(-1);
  const lb2_cuda_plan gemm = make_plan(layers, activation, device, &never);
  if (gemm.num_launches != 4) return failed("the plan is not that of a GEMM", activation);
  if (!gives_expected(problems, layers, gemm, {lb2::cuda::Order::kForward}, index, &other)) return false;
  if (results != other) {
    problems[0].describe();
    return failed("the bits are not those of the GEMM", activation);
  }
  return true;
}

// Many slices of columns to a block, ranks of more than one row tile of a warp and of one alone.
bool run_bits(lb2_activation activation) {
  int ran[9] = {};  // by blocks of a cluster: two or four have no room for the latents of many slices
  for (const int64_t rank : {16, 200, 600}) {
    const int64_t m = 41, k = 4200, n = 330;
    Setup setup(m, k, n, rank);
    const std::vector<float> gemm = setup.run(activation, 0, m);
    for (const int32_t blocks : {1, 2, 4, 8}) {
      lb2_cuda_plan plan;
      if (!plan_fused({setup.args}, activation, setup.device, blocks, &plan)) continue;
      ++ran[blocks];
      setup.tuning = tuning_of(blocks);
      const std::vector<float> fused = setup.run(activation, 0, m);
      if (lb2::cuda::host::runtime().launches.size() != 1 ||
          lb2::cuda::host::runtime().launches[0].cluster_blocks != blocks)
        return failed("not one launch in clusters", activation);
      if (!same_bits(fused.data(), gemm.data(), m * n))
        return failed("the bits are not those of the GEMM", activation);
      if (rank == 200 && blocks == 8 &&
          (!same_alone(setup, activation, {17, 33}, fused) || !spoils_its_own(setup, activation, fused)))
        return false;
    }
  }
  for (const int blocks : {1, 2, 4, 8})
    if (ran[blocks] < (blocks == 1 ? 3 : 1)) return failed("there is no room for a cluster", activation);
  return true;
}

// Where code was made of older PTX, or a part of a GPU has no room for a cluster, the bits are the same
// without.
bool run_without_clusters() {
  Setup setup(70, 2100, 90, 104);
  setup.tuning = tuning_of(4);
  const std::vector<float> expected = setup.run(LB2_ACTIVATION_FLOAT16, 0, 70);
  lb2::cuda::host::Runtime& gpu = lb2::cuda::host::runtime();
  for (const bool old : {true, false}) {
    (old ? gpu.ptx_version : gpu.most_clusters) = old ? 80 : 0;
    const std::vector<float> got = setup.run(LB2_ACTIVATION_FLOAT16, 0, 70);
    const bool alone = gpu.launches.size() == 1 && gpu.launches[0].cluster_blocks == 1;
    gpu.ptx_version = 90;
    gpu.most_clusters = 1000;
    if (!alone) return failed("a cluster where there can be none", LB2_ACTIVATION_FLOAT16);
    if (!same_bits(got.data(), expected.data(), 70 * 90))
      return failed("without clusters the bits are others", LB2_ACTIVATION_FLOAT16);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : problem_count(48);
  int ran = 0;
  for (int i = 0; i < count; ++i)
    if (!run_problem(i, &ran)) return EXIT_FAILURE;
  if (ran < count / 3) {
    std::fprintf(stderr, "there was room for %d of %d problems only\n", ran, count);
    return EXIT_FAILURE;
  }
  for (const lb2_activation mode : kModes)
    if (!skips_sweep(mode) && !run_bits(mode)) return EXIT_FAILURE;
  if (!run_without_clusters()) return EXIT_FAILURE;
  std::printf("%d of %d problems passed\n", ran, count);
  return EXIT_SUCCESS;
}
