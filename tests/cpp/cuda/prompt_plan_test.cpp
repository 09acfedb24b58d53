// Planning of calls of many tokens, which take the GEMM or the kernel of both stages, as plan_test.cpp.
#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <vector>

#include "cuda/plan/fused.h"
#include "cuda/plan/gemm.h"
#include "cuda/plans.h"

namespace {

lb2_cuda_plan plan_of(const Layer& layer, lb2_activation activation, const lb2_cuda_device& device,
                      int32_t fused) {
  const lb2_cuda_tuning tuning = {sizeof(lb2_cuda_tuning), {0, 0}, 0, 0, 0, {0, 0}, {0, 0}, fused};
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  expect(try_plan(layer, activation, &device, &tuning, &plan) == LB2_OK, lb2_last_error());
  return plan;
}

// What must hold of a plan with the GEMM.
void check_gemm(const Layer& layer, const lb2_cuda_plan& plan) {
  const lb2_layer_shape& shape = layer.shape;
  const std::vector<int64_t> ranks(shape.ranks, shape.ranks + shape.num_paths);
  const int stages = shape.single_stage ? 1 : 2;
  expect(plan.num_launches == 2 * stages, "number of launches", plan.num_launches);
  int64_t multiplying = 0;
  for (const lb2_cuda_launch& launch : plan.launches) multiplying += launch.estimated_cycles;
  expect(plan.estimated_cycles > multiplying, "launches and conversions are estimated too",
         plan.estimated_cycles, multiplying);
  expect((plan.unpack_cycles > 0) == (layer.dtype != LB2_FLOAT32), "unpacking is estimated in half precision",
         plan.unpack_cycles);
  expect(plan.token_block <= layer.m && plan.token_block >= std::min<int64_t>(layer.m, 128),
         "tokens of a round", plan.token_block);
  const int64_t block = lb2::cuda::gemm_block_bytes(plan.activation);
  const int64_t groups = (plan.token_block + 7) / 8;
  int64_t least_bytes = 0;
  for (int i = 0; i < plan.num_launches; ++i) {
    const lb2_cuda_launch& s = plan.launches[i];
    expect(s.stage == i / 2 && s.threads == 256 && s.row_warps == 0, "stages in order", s.stage);
    expect(s.chained == (plan.device.capability >= 90), "chained from sm_90 on", plan.device.capability);
    expect(static_cast<int64_t>(s.grid_z) * s.token_tile >= plan.token_block &&
               static_cast<int64_t>(s.grid_z - 1) * s.token_tile < plan.token_block,
           "all tokens", s.grid_z);
    expect(s.grid_z <= 65535 && s.grid_y <= 65535, "grid", s.grid_z);
    const bool first = stages == 2 && s.stage == 0;
    if (i % 2 == 0) {
      expect(s.kind == LB2_CUDA_CONVERT && s.token_tile == 8 && s.row_tile == 0, "conversion first", s.kind);
      const int64_t slices = s.grid_x;
      expect(slices * groups * block <= plan.workspace_bytes, "what is converted fits", slices);
      least_bytes = std::max(least_bytes, slices * groups * block);
      continue;
    }
    expect(s.kind == LB2_CUDA_GEMM && lb2::cuda::has_gemm_tile(plan.activation, s.row_tile, s.token_tile),
           "a tile that there is", s.row_tile, s.token_tile);
    const int64_t cols = stages == 1 || first ? shape.k : 0;
    int64_t slices = (cols + 511) / 512, rows = 0, sums = 0;
    if (!first) {
      slices = 0;
      for (const int64_t rank : ranks) slices += ((stages == 1 ? shape.k : rank) + 511) / 512;
      rows = (shape.n + s.row_tile - 1) / s.row_tile;
      expect(s.grid_y == 1, "the last stage adds no parts");
    } else {
      for (const int64_t rank : ranks) {
        rows += (rank + s.row_tile - 1) / s.row_tile;
        sums += rank;
      }
      expect(s.grid_y <= slices, "no part without a slice", s.grid_y);
      least_bytes += (s.grid_y > 1 ? slices : 1) * plan.token_block * sums * 4;
      slices = (slices + s.grid_y - 1) / s.grid_y;
    }
    expect(s.grid_x == rows, "row tiles", s.grid_x, rows);
    expect(s.shared_bytes == lb2::cuda::gemm_shared_bytes(plan.activation, s.row_tile, s.token_tile, slices),
           "shared memory is what the kernel lays out", s.shared_bytes);
    expect(s.shared_bytes <= plan.device.shared_bytes, "shared memory fits", s.shared_bytes);
  }
  expect(plan.workspace_bytes >= least_bytes, "the workspace holds latents and conversions",
         plan.workspace_bytes);
  // Not even of the widest layers does a round take much more than its bound.
  expect(plan.workspace_bytes <= (int64_t{448} << 20), "the workspace is bounded", plan.workspace_bytes);
}

// What must hold of a plan with one kernel for both stages.
void check_fused(const Layer& layer, const lb2_cuda_plan& plan) {
  const lb2_cuda_launch& s = plan.launches[0];
  const lb2_layer_shape& shape = layer.shape;
  expect(s.stage == 0 && s.threads == 256 && s.row_warps == 0 && s.row_tile == 0, "one launch", s.stage);
  expect(s.chained == (plan.device.capability >= 90), "chained from sm_90 on", plan.device.capability);
  expect(s.grid_y == 1 || s.grid_y == 2 || s.grid_y == 4 || s.grid_y == 8, "blocks of a cluster", s.grid_y);
  expect(s.grid_y == 1 || plan.device.capability >= 90, "clusters from sm_90 on", s.grid_y);
  expect(s.grid_y <= plan.device.multiprocessors, "blocks of a cluster run at the same time", s.grid_y);
  expect(s.grid_x == 1 && s.token_tile == 32 && s.grid_z <= 65535, "grid", s.grid_z);
  expect(plan.token_block == std::min<int64_t>(layer.m, 16384), "tokens of a round", plan.token_block);
  expect(int64_t{s.grid_z} * 32 >= plan.token_block && int64_t{s.grid_z - 1} * 32 < plan.token_block,
         "all tokens of a round", s.grid_z);
  expect(plan.workspace_bytes == 0, "no workspace", plan.workspace_bytes);
  expect(plan.estimated_cycles > s.estimated_cycles, "its start is estimated too", plan.estimated_cycles);
  expect((plan.unpack_cycles > 0) == (layer.dtype != LB2_FLOAT32), "unpacking is estimated in half precision",
         plan.unpack_cycles);
  int64_t pitch = 4, latents = 0;
  const int64_t slices = (shape.k + 511) / 512;
  expect(!shape.single_stage, "two stages");
  for (int64_t p = 0; p < shape.num_paths; ++p) {
    const int64_t rank = shape.ranks[p];
    pitch += (rank + 15) / 16 * 16;
    const int64_t last = rank - (rank - 1) / 512 * 512;
    latents += (rank - 1) / 512 * lb2::cuda::fused_buffer_bytes(plan.activation) +
               4 * ((last + 127) / 128 * lb2::cuda::fused_index_bytes(plan.activation) + 64);
  }
  const int64_t parts = s.grid_y == 1 ? 1 : (slices + s.grid_y - 1) / s.grid_y;
  expect(s.shared_bytes == lb2::cuda::fused_layout(plan.activation, static_cast<int>(latents),
                                                   static_cast<int>(parts * 32 * pitch * 4))
                               .bytes,
         "shared memory is what the kernel lays out", s.shared_bytes);
  expect(s.shared_bytes <= plan.device.shared_bytes, "shared memory fits", s.shared_bytes);
}

void test_every_plan_fits() {
  int fused = 0;
  const std::vector<std::vector<int64_t>> ranks = {{8},          {80, 80},      {120, 256}, {296, 296},
                                                   {2024, 2024}, {8, 24, 3168}, {0},        {0, 0}};
  for (const lb2_cuda_device& device : kGpus)
    for (const auto& rank : ranks)
      for (const int64_t k : {1, 33, 512, 513, 4096, 28672})
        for (const int64_t n : {1, 17, 1024, 28672})
          for (const int64_t m : {17, 100, 5000})
            for (const lb2_activation mode :
                 {LB2_ACTIVATION_EXACT, LB2_ACTIVATION_FLOAT16, LB2_ACTIVATION_INT8}) {
              const Layer layer(m, k, n, rank, LB2_FLOAT16);
              const lb2_cuda_plan plan = plan_of(layer, mode, device),
                                  gemm = plan_of(layer, mode, device, -1);
              check_gemm(layer, gemm);
              expect(plan.estimated_cycles <= gemm.estimated_cycles, "the one of the lower estimate",
                     plan.estimated_cycles, gemm.estimated_cycles);
              if (!lb2::cuda::is_fused(plan)) continue;
              ++fused;
              check_fused(layer, plan);
            }
  expect(fused > 100, "small ranks take one kernel for both stages", fused);
}

// Unpacking costs what it costs for one token, and its products what they do: more tokens take longer, and
// where ours take longer per token, unpacking wins in the end.
void test_unpacking_is_for_many_tokens() {
  for (const lb2_cuda_device& device : kGpus) {
    int64_t before = 0;
    for (const int64_t m : {17, 128, 1024, 8192, 65536}) {
      const lb2_cuda_plan plan =
          plan_of(Layer(m, 8192, 28672, {632, 632}, LB2_BFLOAT16), LB2_ACTIVATION_AUTO, device);
      expect(plan.unpack_cycles > before, "more tokens take longer", m, plan.unpack_cycles);
      before = plan.unpack_cycles;
      if (m == 17)
        expect(plan.unpack_cycles > plan.estimated_cycles, "few tokens do not pay", device.capability);
      if (m == 65536 && device.capability >= 90 && device.capability <= 100)
        expect(plan.unpack_cycles < plan.estimated_cycles, "many do where libraries have the faster MMAs",
               device.capability);
    }
  }
  // Sizes at which counts of bytes are far beyond 64 bits.
  const lb2_cuda_plan most = plan_of(Layer(INT32_MAX, 1 << 24, 1 << 24, {1 << 20, 1 << 20}, LB2_BFLOAT16),
                                     LB2_ACTIVATION_AUTO, kGpus[3]);
  expect(most.unpack_cycles > 0 && most.estimated_cycles > 0, "no overflow", most.unpack_cycles);
}

// A call accepts the plan as it is, and not with a bit changed.
void check_resumed(const Layer& layer, const lb2_cuda_plan& plan) {
  lb2::cuda::Plan resumed;
  expect(resume(layer, &plan, &resumed) == LB2_OK, lb2_last_error());
  for (size_t at = offsetof(lb2_cuda_plan, workspace_bytes); at < sizeof plan; ++at) {
    lb2_cuda_plan wrong = plan;
    reinterpret_cast<unsigned char*>(&wrong)[at] ^= 0x10;
    expect(resume(layer, &wrong, &resumed) != LB2_OK, "a changed plan is refused", static_cast<int64_t>(at));
  }
}

// Every tile is planned as asked for, and a call accepts it.
void test_gemm_tuning() {
  for (const lb2_cuda_device& device : kGpus)
    for (const lb2_activation mode : {LB2_ACTIVATION_EXACT, LB2_ACTIVATION_FLOAT16, LB2_ACTIVATION_INT8})
      for (const lb2::cuda::GemmTile& tile : lb2::cuda::kGemmTiles)
        for (const int32_t splits : {0, 1, 3, 8}) {
          const Layer layer(700, 4096, 1024, {80, 296}, LB2_FLOAT16);
          const lb2_cuda_tuning tuning = {sizeof(lb2_cuda_tuning),    {0, 0}, splits, 0, 0, {tile.rows, 0},
                                          {tile.tokens, tile.tokens}, 0};
          lb2_cuda_plan plan = {};
          plan.struct_size = sizeof plan;
          const lb2_status got = try_plan(layer, mode, &device, &tuning, &plan);
          if (!lb2::cuda::has_gemm_tile(mode, tile.rows, tile.tokens)) {
            expect(got == LB2_ERROR_INVALID_ARGUMENT, "no such tile in this mode", tile.rows, tile.tokens);
            continue;
          }
          expect(got == LB2_OK, lb2_last_error());
          check_gemm(layer, plan);
          expect(plan.launches[1].row_tile == tile.rows && plan.launches[1].token_tile == tile.tokens &&
                     plan.launches[3].token_tile == tile.tokens,
                 "the tile asked for", tile.rows, tile.tokens);
          expect(splits == 0 || plan.launches[1].grid_y == splits, "the split asked for", splits,
                 plan.launches[1].grid_y);
          check_resumed(layer, plan);
        }
}

// Clusters are planned as asked for, and a call accepts them; where they cannot be, that is said.
void test_fused_tuning() {
  for (const lb2_cuda_device& device : kGpus)
    for (const lb2_activation mode : {LB2_ACTIVATION_EXACT, LB2_ACTIVATION_FLOAT16, LB2_ACTIVATION_INT8})
      for (const int32_t fused : {-1, 1, 2, 4, 8}) {
        const Layer layer(700, 4096, 1024, {80, 120}, LB2_FLOAT16);
        const lb2_cuda_tuning tuning = {sizeof(lb2_cuda_tuning), {0, 0}, 0, 0, 0, {0, 0}, {0, 0}, fused};
        lb2_cuda_plan plan = {};
        plan.struct_size = sizeof plan;
        const lb2_status got = try_plan(layer, mode, &device, &tuning, &plan);
        if (fused > 1 && device.capability < 90) {
          expect_error(got, LB2_ERROR_UNSUPPORTED, "tuning->fused");
          continue;
        }
        // Eight slices: parts of as many as a block has, of 204 floats for a token, beside two buffers.
        const int64_t parts = fused == 1 ? 1 : 8 / std::abs(fused);
        if (fused > 0 &&
            2 * lb2::cuda::fused_buffer_bytes(mode) + parts * 32 * 204 * 4 > device.shared_bytes) {
          expect_error(got, LB2_ERROR_UNSUPPORTED, "tuning->fused");
          continue;
        }
        expect(got == LB2_OK, lb2_last_error());
        if (fused < 0) {
          check_gemm(layer, plan);
          continue;
        }
        check_fused(layer, plan);
        expect(plan.launches[0].grid_y == fused, "the cluster asked for", fused, plan.launches[0].grid_y);
        check_resumed(layer, plan);
      }
  // Few multiprocessors have no room for a cluster.
  for (const int32_t sms : {1, 3, 7}) {
    const Layer layer(700, 4096, 1024, {80, 120}, LB2_FLOAT16);
    const lb2_cuda_plan plan = plan_of(layer, LB2_ACTIVATION_FLOAT16, gpu(90, sms, 232448));
    if (lb2::cuda::is_fused(plan)) check_fused(layer, plan);
  }
  // Numbers of a GEMM's launches, which the one of both stages has not.
  {
    const Layer layer(700, 4096, 1024, {80, 120}, LB2_FLOAT16);
    lb2_cuda_tuning both = {sizeof(lb2_cuda_tuning), {0, 0}, 2, 0, 0, {0, 0}, {0, 0}, 1};
    lb2_cuda_plan plan = {};
    plan.struct_size = sizeof plan;
    expect_error(try_plan(layer, LB2_ACTIVATION_FLOAT16, &kGpus[3], &both, &plan), LB2_ERROR_INVALID_ARGUMENT,
                 "tuning->splits, gemm_rows and gemm_tokens must be 0");
    both.fused = 0;
    expect(try_plan(layer, LB2_ACTIVATION_FLOAT16, &kGpus[3], &both, &plan) == LB2_OK &&
               lb2::cuda::is_gemm(plan) && plan.launches[1].grid_y == 2,
           "a GEMM that is asked for");
  }
  // Ranks that no block has room for, single stages, more paths than it knows, launches of a GEMM asked for.
  const lb2_cuda_tuning one = {sizeof(lb2_cuda_tuning), {0, 0}, 0, 0, 0, {0, 0}, {0, 0}, 1};
  for (const std::vector<int64_t>& ranks :
       {std::vector<int64_t>{1280}, std::vector<int64_t>{0}, std::vector<int64_t>(9, 8)}) {
    const Layer layer(700, 4096, 1024, ranks, LB2_FLOAT16);
    lb2_cuda_plan plan = {};
    plan.struct_size = sizeof plan;
    expect_error(try_plan(layer, LB2_ACTIVATION_FLOAT16, &kGpus[3], &one, &plan), LB2_ERROR_UNSUPPORTED,
                 "do not fit into one kernel");
    expect(!lb2::cuda::is_fused(plan_of(layer, LB2_ACTIVATION_FLOAT16, kGpus[3])), "it has no room",
           ranks[0]);
  }
}

// A prompt of Llama-2-70B's widest layer fills an H200 in both stages, and M = 64 too.
void test_gemm_fills_the_gpu() {
  for (const int64_t m : {64, 512, 2048}) {
    const lb2_cuda_plan plan =
        plan_of(Layer(m, 8192, 28672, {296, 296}, LB2_FLOAT16), LB2_ACTIVATION_AUTO, kGpus[3], -1);
    for (const int i : {1, 3}) {
      const int64_t blocks =
          int64_t{plan.launches[i].grid_x} * plan.launches[i].grid_y * plan.launches[i].grid_z;
      expect(blocks >= 80, "most SMs have a block", m, blocks);
    }
  }
}

}  // namespace

int main() {
  test_every_plan_fits();
  test_unpacking_is_for_many_tokens();
  test_gemm_tuning();
  test_fused_tuning();
  test_gemm_fills_the_gpu();
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
