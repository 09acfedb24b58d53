// Planning of CUDA calls: pure functions, so everything about them is checked without a GPU. Calls of many
// tokens are prompt_plan_test.cpp's.
#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/decode/plain_params.h"
#include "cuda/decode/sizes.h"
#include "cuda/plan/check.h"
#include "cuda/plan/fused.h"
#include "cuda/plan/gemm.h"
#include "cuda/plans.h"

namespace {

// The arguments of a call on a layer, with addresses that nothing reads.
struct Arguments {
  int32_t words[LB2_MAX_PATHS] = {};
  float scale = 0.0f;
  lb2_path paths[LB2_MAX_PATHS] = {};
  lb2_linear_args args = {};
  explicit Arguments(const Layer& layer) {
    const lb2_layer_shape& shape = layer.shape;
    for (int64_t p = 0; p < shape.num_paths; ++p) {
      paths[p] = {words + shape.shares[p],
                  lb2_words_per_row(shape.k),
                  words,
                  lb2_words_per_row(shape.ranks[p]),
                  &scale,
                  &scale,
                  &scale,
                  shape.ranks[p]};
      if (shape.single_stage) paths[p].u = nullptr, paths[p].latent_scale = nullptr;
    }
    args.struct_size = sizeof args;
    args.m = layer.m;
    args.k = shape.k;
    args.n = shape.n;
    args.paths = paths;
    args.num_paths = shape.num_paths;
    args.dtype = layer.dtype;
  }
  Arguments(const Arguments&) = delete;  // args points into it
  Arguments& operator=(const Arguments&) = delete;
};

const lb2_cuda_launch& decode_of(const lb2_cuda_plan& plan, int stage) {
  for (const lb2_cuda_launch& launch : plan.launches)
    if (launch.kind == LB2_CUDA_DECODE && launch.stage == stage) return launch;
  std::abort();
}

void test_every_plan_fits() {
  const std::vector<std::vector<int64_t>> ranks = {{8},           {296, 296}, {600}, {2024, 2024},
                                                   {8, 24, 3168}, {0},        {0, 0}};
  for (const lb2_cuda_device& device : kGpus)
    for (const auto& rank : ranks)
      for (const int64_t k : {1, 33, 512, 513, 4096, 28672})
        for (const int64_t n : {1, 17, 1024, 28672})
          for (const int64_t m : {0, 1, 2, 3, 8, 16, 17, 100, 5000})
            for (lb2_activation mode = LB2_ACTIVATION_AUTO; mode <= LB2_ACTIVATION_FLOAT16; ++mode) {
              const Layer layer(m, k, n, rank, LB2_FLOAT16);
              const lb2_cuda_plan plan = plan_of(layer, mode, device);
              if (lb2::cuda::is_gemm(plan) || lb2::cuda::is_fused(plan)) continue;
              const int stages = rank[0] == 0 ? 1 : 2;
              expect(plan.num_launches == (m > 4 ? 2 * stages : stages), "number of launches",
                     plan.num_launches);
              int64_t sums = 0, first_parts = 0;
              for (const int64_t r : rank) sums += r;
              for (int i = 0; i < plan.num_launches; ++i) {
                const lb2_cuda_launch& s = plan.launches[i];
                expect(s.shared_bytes <= device.shared_bytes, "shared memory fits", s.shared_bytes);
                expect(s.grid_x >= 1 && s.grid_y >= 1 && s.grid_z >= 1 && s.grid_y <= 65535, "grid",
                       s.grid_x);
                expect(static_cast<int64_t>(s.grid_z) * s.token_tile >= plan.token_block, "all tokens",
                       s.grid_z);
                expect(s.chained == (device.capability >= 90), "chained from sm_90 on", device.capability);
                expect(s.stage == (m > 4 ? i / 2 : i), "stages in order", s.stage);
                if (s.kind == LB2_CUDA_CONVERT) {
                  expect(m > 4 && i % 2 == 0, "many tokens are converted before each stage", m, i);
                  continue;
                }
                expect(s.row_warps * s.split_warps * 32 == s.threads, "warps make the block", s.row_warps);
                expect(s.chunk_slices >= 1, "at least one slice is staged", s.chunk_slices);
                expect(
                    s.shared_bytes == s.chunk_slices * lb2::cuda::slice_bytes(plan.activation, s.token_tile) +
                                          lb2::cuda::sums_bytes(s.token_tile),
                    "shared memory is what the kernel lays out", s.shared_bytes);
                if (i + 1 == plan.num_launches)
                  expect(s.grid_y == 1, "the last stage adds no parts");
                else
                  first_parts = s.grid_y;
              }
              expect(plan.workspace_bytes >= first_parts * plan.token_block * sums * 4,
                     "the workspace holds every partial latent", plan.workspace_bytes);
            }
}

// What decides the order of sums may not depend on the number of tokens.
void test_shape_does_not_depend_on_tokens() {
  for (const lb2_cuda_device& device : kGpus)
    for (const int64_t k : {100, 4096, 28672}) {
      const lb2_cuda_plan one =
          plan_of(Layer(1, k, 4096, {80, 296}, LB2_BFLOAT16), LB2_ACTIVATION_AUTO, device);
      for (const int64_t m : {2, 7, 16, 300, 8192}) {
        const lb2_activation mode = m <= 16 ? LB2_ACTIVATION_AUTO : one.activation;
        if (lb2::cuda::uses_gemm(mode, m, device.shared_bytes))
          continue;  // no order of its depends on a shape
        const lb2_cuda_plan many = plan_of(Layer(m, k, 4096, {80, 296}, LB2_BFLOAT16), mode, device);
        for (int stage = 0; stage < 2; ++stage)
          expect(decode_of(one, stage).grid_y == decode_of(many, stage).grid_y &&
                     decode_of(one, stage).row_warps == decode_of(many, stage).row_warps,
                 "splits are those of one token", k, m);
      }
    }
}

void test_auto() {
  const auto resolved = [](lb2_dtype dtype, const lb2_cuda_device& device) {
    return plan_of(Layer(1, 64, 64, {8}, dtype), LB2_ACTIVATION_AUTO, device).activation;
  };
  for (const lb2_cuda_device& device : kGpus) {
    const lb2_activation halves = device.capability < 100 ? LB2_ACTIVATION_INT16 : LB2_ACTIVATION_FLOAT16;
    expect(resolved(LB2_FLOAT16, device) == halves, "auto for float16", device.capability);
    expect(resolved(LB2_BFLOAT16, device) == halves, "auto for bfloat16", device.capability);
    expect(resolved(LB2_FLOAT32, device) == LB2_ACTIVATION_EXACT, "auto for float32", device.capability);
    for (const int64_t m : {16, 17, 5000}) {
      const lb2_cuda_plan plan = plan_of(Layer(m, 64, 64, {8}, LB2_BFLOAT16), LB2_ACTIVATION_AUTO, device);
      expect(plan.activation == (m > 16 ? LB2_ACTIVATION_FLOAT16 : halves), "auto of many tokens", m);
      expect((lb2::cuda::is_gemm(plan) || lb2::cuda::is_fused(plan)) == (m > 16), "many tokens take the GEMM",
             m);
      expect((plan.unpack_cycles > 0) == (m > 16) && (plan.estimated_cycles > 0) == (m > 16),
             "estimates of calls with a GEMM alone", m);
    }
  }
  for (const lb2_activation mode : {LB2_ACTIVATION_INT16, LB2_ACTIVATION_SIGN})
    expect(!lb2::cuda::is_gemm(plan_of(Layer(512, 64, 64, {8}, LB2_FLOAT16), mode, kGpus[3])),
           "1-bit modes have no GEMM", mode);
  const lb2_cuda_device small = gpu(80, 108, 64 * 1024);
  expect(!lb2::cuda::is_gemm(plan_of(Layer(512, 64, 64, {8}, LB2_FLOAT16), LB2_ACTIVATION_FLOAT16, small)),
         "the GEMM has no room");
}

// A layer of Llama-2-70B at 0.1 bpw keeps all SMs of an H200 busy in both stages.
void test_large_layer_fills_the_gpu() {
  const lb2_cuda_plan plan =
      plan_of(Layer(1, 8192, 28672, {296, 296}, LB2_FLOAT16), LB2_ACTIVATION_AUTO, kGpus[3]);
  for (int i = 0; i < 2; ++i) {
    const int64_t blocks = plan.launches[i].grid_x * plan.launches[i].grid_y;
    expect(blocks >= 66, "at least every second SM has a block", i, blocks);
  }
}

void test_errors() {
  const Layer layer(1, 64, 64, {8}, LB2_FLOAT16);
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  lb2_cuda_device old = gpu(75, 40, 65536), tiny = gpu(80, 0, 166912), wrong = gpu(80, 1, 166912);
  expect_error(try_plan(layer, 0, &old, nullptr, &plan), LB2_ERROR_UNSUPPORTED, "8.0 or newer, got 7.5");
  expect_error(try_plan(layer, 0, &tiny, nullptr, &plan), LB2_ERROR_INVALID_ARGUMENT, "multiprocessors");
  expect_error(try_plan(layer, 6, &wrong, nullptr, &plan), LB2_ERROR_INVALID_ARGUMENT, "activation");
  expect_error(try_plan(layer, 0, nullptr, nullptr, &plan), LB2_ERROR_INVALID_ARGUMENT, "device");
  expect_error(try_plan(layer, 0, &wrong, nullptr, nullptr), LB2_ERROR_INVALID_ARGUMENT, "plan");
  expect_error(lb2_linear_plan_cuda(nullptr, 1, LB2_FLOAT16, 0, &wrong, nullptr, &plan),
               LB2_ERROR_INVALID_ARGUMENT, "shape must not be NULL");
  expect_error(lb2_linear_plan_cuda(&layer.shape, -1, LB2_FLOAT16, 0, &wrong, nullptr, &plan),
               LB2_ERROR_INVALID_ARGUMENT, "m must be between 0");
  expect_error(lb2_linear_plan_cuda(&layer.shape, 1, LB2_INT8, 0, &wrong, nullptr, &plan),
               LB2_ERROR_INVALID_ARGUMENT, "dtype must be");
  wrong.shared_bytes = 1024;
  expect_error(try_plan(layer, 0, &wrong, nullptr, &plan), LB2_ERROR_INVALID_ARGUMENT, "shared_bytes");
  wrong.struct_size = 1;
  expect_error(try_plan(layer, 0, &wrong, nullptr, &plan), LB2_ERROR_INVALID_ARGUMENT, "struct_size");
}

// Every shape that tuning allows is planned as asked for, and a call accepts it; a plan of anything else it
// refuses.
void test_tuning() {
  const lb2_cuda_device& device = kGpus[3];
  const Layer layer(5, 4096, 1024, {80, 296}, LB2_FLOAT16);
  for (const int32_t row_warps : {0, 1, 2, 4, 8})
    for (const int32_t splits : {0, 1, 3, 8})
      for (const int32_t max_chunk : {0, 1, 2})
        for (const int32_t unchained : {0, 1}) {
          const lb2_cuda_tuning tuning = {sizeof(lb2_cuda_tuning),
                                          {row_warps, row_warps},
                                          splits,
                                          max_chunk,
                                          unchained,
                                          {0, 0},
                                          {0, 0},
                                          0};
          lb2_cuda_plan plan = {};
          plan.struct_size = sizeof plan;
          expect(try_plan(layer, 0, &device, &tuning, &plan) == LB2_OK, lb2_last_error());
          const lb2_cuda_launch &first = decode_of(plan, 0), &last = decode_of(plan, 1);
          expect(row_warps == 0 || (first.row_warps == row_warps && last.row_warps == row_warps),
                 "row warps are those asked for", row_warps, last.row_warps);
          expect(splits == 0 || first.grid_y == splits, "splits are those asked for", splits, first.grid_y);
          expect(max_chunk == 0 || first.chunk_slices <= max_chunk, "the chunk is bounded", max_chunk);
          expect(plan.num_launches == 4, "five tokens are converted ahead");
          expect(last.chained == !unchained, "chained unless asked not to be", unchained);
          lb2::cuda::Plan resumed;
          expect(resume(layer, &plan, &resumed) == LB2_OK, lb2_last_error());
        }
}

void test_plans_are_checked() {
  const Layer layer(3, 4096, 1024, {80, 296}, LB2_FLOAT16), other(3, 4096, 1024, {80, 304}, LB2_FLOAT16);
  const lb2_cuda_plan plan = plan_of(layer, LB2_ACTIVATION_AUTO, kGpus[3]);
  lb2::cuda::Plan resumed;
  expect_error(resume(other, &plan, &resumed), LB2_ERROR_INVALID_ARGUMENT,
               "plan must be what was made for the sizes and paths of this call");
  expect_error(resume(layer, nullptr, &resumed), LB2_ERROR_INVALID_ARGUMENT, "plan");
  expect(resume(layer, &plan, &resumed) == LB2_OK, lb2_last_error());
  // The first launch may follow a kernel that wrote the layer; the others follow one of ours.
  const Arguments arguments(layer);
  lb2::cuda::Layers layers;
  expect(lb2::cuda::gather_layers(&arguments.args, 1, &layers) == LB2_OK, lb2_last_error());
  for (int i = 0; i < resumed.num_launches; ++i) {
    lb2::cuda::DecodeLaunch next;
    expect(lb2::cuda::next_decode_launch(layers, resumed, i, 0, 3, i > 0, nullptr, &next), "a launch", i);
    expect(next.params.signs_early == (i > 0), "signs early", i);
  }
  // Any byte that is changed makes another plan; only the device is known where there is one.
  for (size_t at = 0; at < sizeof plan; ++at) {
    if (at >= offsetof(lb2_cuda_plan, device) && at < offsetof(lb2_cuda_plan, workspace_bytes)) continue;
    lb2_cuda_plan wrong = plan;
    reinterpret_cast<unsigned char*>(&wrong)[at] ^= 0x10;
    expect(resume(layer, &wrong, &resumed) != LB2_OK, "a changed plan is refused", static_cast<int64_t>(at));
  }
}

void test_tuning_errors() {
  const Layer layer(1, 1024, 64, {8}, LB2_FLOAT32);
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  const auto error_of = [&](lb2_cuda_tuning tuning, const char* part) {
    expect_error(try_plan(layer, 0, kGpus, &tuning, &plan), LB2_ERROR_INVALID_ARGUMENT, part);
  };
  error_of({1, {0, 0}, 0, 0, 0, {0, 0}, {0, 0}, 0}, "tuning->struct_size");
  error_of({sizeof(lb2_cuda_tuning), {0, 3}, 0, 0, 0, {0, 0}, {0, 0}, 0},
           "tuning->row_warps must be 0, 1, 2, 4 or 8, got 3");
  error_of({sizeof(lb2_cuda_tuning), {16, 0}, 0, 0, 0, {0, 0}, {0, 0}, 0}, "tuning->row_warps");
  error_of({sizeof(lb2_cuda_tuning), {0, 0}, 3, 0, 0, {0, 0}, {0, 0}, 0},
           "tuning->splits must be between 0 and 2, got 3");
  error_of({sizeof(lb2_cuda_tuning), {0, 0}, 0, -1, 0, {0, 0}, {0, 0}, 0},
           "tuning->max_chunk must be >= 0, got -1");
  error_of({sizeof(lb2_cuda_tuning), {0, 0}, 0, 0, 0, {0, 64}, {0, 64}, 0},
           "tuning->gemm_rows and gemm_tokens must");
  error_of({sizeof(lb2_cuda_tuning), {0, 0}, 0, 0, 0, {0, 0}, {16, 0}, 0}, "got 0 and 16");
}

void test_sizes_and_addresses() {
  const Layer huge(1, INT32_MAX - 5, 64, {8}, LB2_FLOAT32);
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  expect_error(try_plan(huge, 0, kGpus, nullptr, &plan), LB2_ERROR_UNSUPPORTED,
               "must be at most 536869888 on CUDA, got 2147483642");
  Arguments call(Layer(1, 64, 64, {8, 8}, LB2_FLOAT16));
  call.args.input = reinterpret_cast<const void*>(uintptr_t{1026});
  expect(lb2::cuda::check_addresses(call.args) == LB2_OK, lb2_last_error());
  call.args.input = reinterpret_cast<const void*>(uintptr_t{1025});
  expect_error(lb2::cuda::check_addresses(call.args), LB2_ERROR_INVALID_ARGUMENT,
               "input must be aligned to 2 bytes");
  call.args.input = nullptr;
  call.paths[1].u = reinterpret_cast<const int32_t*>(uintptr_t{1026});
  expect_error(lb2::cuda::check_addresses(call.args), LB2_ERROR_INVALID_ARGUMENT,
               "paths[1].u must be aligned to 4 bytes");
}

// q, k and v of a model with fewer key and value heads, as one call.
void test_grouped() {
  const Layer q(1, 4096, 4096, {144, 144}, LB2_BFLOAT16), k(1, 4096, 1024, {80, 80}, LB2_BFLOAT16),
      v(1, 4096, 1024, {304}, LB2_BFLOAT16);
  const lb2_layer_shape shapes[3] = {q.shape, k.shape, v.shape};
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  for (const lb2_cuda_device& device : kGpus)
    for (const int64_t m : {0, 1, 4, 5, 16, 700}) {
      expect(lb2_grouped_plan_cuda(shapes, 3, m, LB2_BFLOAT16, 0, &device, nullptr, &plan) == LB2_OK,
             lb2_last_error());
      // As many launches as one layer has, and blocks for all rows.
      if (lb2::cuda::is_fused(plan)) {
        expect(m == 700 && device.capability >= 90, "both stages of all layers in one", m, device.capability);
        continue;
      }
      expect(plan.num_launches == (m > 4 ? 4 : 2), "launches of one layer", plan.num_launches, m);
      expect(plan.first_stages == 5, "first stages of all layers", plan.first_stages);
      const int64_t rows[2] = {2 * 144 + 2 * 80 + 304, 4096 + 1024 + 1024};
      for (int stage = 0; stage < 2; ++stage) {
        if (lb2::cuda::is_gemm(plan)) {
          const lb2_cuda_launch& gemm = plan.launches[2 * stage + 1];
          expect(static_cast<int64_t>(gemm.grid_x) * gemm.row_tile >= rows[stage], "blocks for all rows",
                 gemm.grid_x, stage);
          continue;
        }
        const lb2_cuda_launch& decode = decode_of(plan, stage);
        expect(static_cast<int64_t>(decode.grid_x) * 16 * decode.row_warps >= rows[stage],
               "blocks for all rows", decode.grid_x, stage);
      }
      int64_t macs = 0;
      for (int i = 0; i < 3; ++i) {
        const lb2_cuda_plan one = plan_of(i == 0 ? q : i == 1 ? k : v, LB2_ACTIVATION_AUTO, device);
        macs += one.macs * m;
      }
      expect(plan.macs == macs, "operations of all layers", plan.macs, macs);
      lb2::cuda::CallShape call;
      lb2::cuda::Plan resumed;
      expect(lb2::cuda::gather_shapes(shapes, 3, m, LB2_BFLOAT16, &call) == LB2_OK, lb2_last_error());
      expect(lb2::cuda::resume_plan(call, &plan, &resumed) == LB2_OK, lb2_last_error());
      expect(lb2::cuda::gather_shapes(shapes, 2, m, LB2_BFLOAT16, &call) == LB2_OK, lb2_last_error());
      expect(lb2::cuda::resume_plan(call, &plan, &resumed) != LB2_OK, "a plan of other layers is refused");
    }
}

// First stages that the paths of a layer share, in a group too; layers share none with each other.
void test_shared_first_stages() {
  Layer layer(3, 600, 64, {16, 8, 16, 16}, LB2_FLOAT16);
  layer.shape.shares[2] = 0;
  const Layer apart(3, 600, 64, {16, 8, 16, 16}, LB2_FLOAT16);
  const int64_t last = 64 * (16 + 8 + 16 + 16);
  expect(plan_of(layer, 0, kGpus[0]).first_stages == 3 && plan_of(apart, 0, kGpus[0]).first_stages == 4,
         "first stages");
  expect(plan_of(layer, 0, kGpus[0]).macs == 3 * (600 * (16 + 8 + 16) + last), "operations");
  const Arguments arguments(layer);
  const lb2_linear_args twice[2] = {arguments.args, arguments.args};
  lb2::cuda::Layers layers;
  expect(lb2::cuda::gather_layers(twice, 2, &layers) == LB2_OK, lb2_last_error());
  const lb2::FirstStages& first = layers.shape.first;
  const int leaders[] = {0, 1, 3, 4, 5, 7}, groups[] = {0, 1, 0, 2, 3, 4, 3, 5};
  expect(first.num_groups == 6, "first stages of a group", first.num_groups);
  expect(std::equal(leaders, leaders + 6, first.leader_of), "leaders");
  expect(std::equal(groups, groups + 8, first.group_of), "groups");
}

void test_grouped_errors() {
  const Layer one(1, 64, 64, {8}, LB2_FLOAT16), wide(1, 96, 64, {8}, LB2_FLOAT16),
      many(2, 64, 64, {8}, LB2_FLOAT16), single(1, 64, 64, {0}, LB2_FLOAT16),
      exact(1, 64, 64, {8}, LB2_FLOAT32), nine(1, 64, 64, std::vector<int64_t>(9, 8), LB2_FLOAT16),
      odd(1, 64, 64, {12}, LB2_FLOAT16), huge(1, 64, INT32_MAX, {8}, LB2_FLOAT16);
  const lb2_status invalid = LB2_ERROR_INVALID_ARGUMENT;
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  const auto shapes_error = [&](const Layer& first, const Layer& second, lb2_status status,
                                const char* part) {
    const lb2_layer_shape shapes[2] = {first.shape, second.shape};
    expect_error(lb2_grouped_plan_cuda(shapes, 2, 1, LB2_FLOAT16, 0, kGpus, nullptr, &plan), status, part);
  };
  shapes_error(one, wide, invalid, "shapes[1].k must equal that of shapes[0], 64, got 96");
  shapes_error(one, single, invalid, "shapes[1] must have two stages like shapes[0]");
  shapes_error(single, one, invalid, "shapes[1] must have a single stage like shapes[0]");
  shapes_error(one, odd, invalid, "shapes[1]: ranks[0] must be a multiple of 8, got 12");
  shapes_error(one, huge, LB2_ERROR_UNSUPPORTED, "shapes[1]: k, n and every rank must be at most");
  shapes_error(nine, nine, LB2_ERROR_UNSUPPORTED, "at most 16 paths in all, got 18 by shapes[1]");
  for (const int64_t count : {0, 17})
    expect_error(lb2_grouped_plan_cuda(&one.shape, count, 1, LB2_FLOAT16, 0, kGpus, nullptr, &plan), invalid,
                 "num_layers must be between 1 and 16");
  expect_error(lb2_grouped_plan_cuda(nullptr, 2, 1, LB2_FLOAT16, 0, kGpus, nullptr, &plan), invalid,
               "shapes must not be NULL");

  const auto args_error = [](const lb2_linear_args& first, const lb2_linear_args& second, lb2_status status,
                             const char* part) {
    const lb2_linear_args args[2] = {first, second};
    lb2::cuda::Layers layers;
    expect_error(lb2::cuda::gather_layers(args, 2, &layers), status, part);
  };
  const Arguments call(one);
  args_error(call.args, Arguments(wide).args, invalid,
             "layers[1].k must equal that of layers[0], 64, got 96");
  args_error(call.args, Arguments(many).args, invalid, "layers[1].m must equal that of layers[0], 1, got 2");
  args_error(call.args, Arguments(exact).args, invalid,
             "layers[1].dtype must equal that of layers[0], 1, got 0");
  args_error(call.args, Arguments(single).args, invalid, "layers[1] must have two stages like layers[0]");
  args_error(Arguments(nine).args, Arguments(nine).args, LB2_ERROR_UNSUPPORTED,
             "at most 16 paths in all, got 18 by layers[1]");
  Arguments other(one);
  other.args.input_stride = 7;
  args_error(call.args, other.args, invalid, "layers[1].input_stride must equal that of layers[0], 0, got 7");
  other.args.input_stride = 0;
  other.args.input = &plan;
  args_error(call.args, other.args, invalid, "layers[1].input must be that of layers[0]");
  other.args.input = nullptr;
  other.paths[0].v = nullptr;
  args_error(call.args, other.args, invalid, "layers[1]: paths[0].v must not be NULL");
  lb2::cuda::Layers layers;
  expect_error(lb2::cuda::gather_layers(nullptr, 2, &layers), invalid, "layers must not be NULL");
  expect_error(lb2::cuda::gather_layers(nullptr, 1, &layers), invalid, "args must not be NULL");
  expect_error(lb2::cuda::gather_layers(&call.args, 17, &layers), invalid,
               "num_layers must be between 1 and 16");
}

}  // namespace

int main() {
  test_every_plan_fits();
  test_shape_does_not_depend_on_tokens();
  test_auto();
  test_large_layer_fills_the_gpu();
  test_errors();
  test_tuning();
  test_sizes_and_addresses();
  test_tuning_errors();
  test_plans_are_checked();
  test_grouped();
  test_shared_first_stages();
  test_grouped_errors();
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
