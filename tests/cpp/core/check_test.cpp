// Every refusal of the C ABI: wrong arguments give LB2_ERROR_INVALID_ARGUMENT and a message that names them.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "littlebit2/littlebit2.h"

namespace {

int failures = 0;

struct Layer {
  static constexpr int64_t kM = 2, kK = 40, kN = 9, kR = 8;
  std::vector<int32_t> v = std::vector<int32_t>(kR * 2), u = std::vector<int32_t>(kN),
                       single = std::vector<int32_t>(kN * 2);
  std::vector<float> in_scale = std::vector<float>(kK, 1.0f), latent_scale = std::vector<float>(kR, 1.0f);
  std::vector<float> out_scale = std::vector<float>(kN, 1.0f), x = std::vector<float>(kM * kK, 1.0f);
  std::vector<float> y = std::vector<float>(kM * kN);
  std::vector<char> workspace = std::vector<char>(1 << 16);
  lb2_path paths[2] = {};
  lb2_linear_args args = {};

  Layer() {
    for (lb2_path& path : paths)
      path = {v.data(), 2, u.data(), 1, in_scale.data(), latent_scale.data(), out_scale.data(), kR};
    args.struct_size = sizeof args;
    args.m = kM;
    args.k = kK;
    args.n = kN;
    args.paths = paths;
    args.num_paths = 2;
    args.input = x.data();
    args.input_stride = kK;
    args.output = y.data();
    args.output_stride = kN;
    args.workspace = workspace.data();
    args.workspace_bytes = static_cast<int64_t>(workspace.size());
  }
};

void expect_refusal(const char* text, const std::function<void(Layer&)>& spoil,
                    lb2_status expected = LB2_ERROR_INVALID_ARGUMENT) {
  Layer layer;
  spoil(layer);
  const lb2_status status = lb2_linear_forward_cpu(&layer.args);
  if (status == expected && std::strstr(lb2_last_error(), text) != nullptr) return;
  std::fprintf(stderr, "expected status %d and a message with \"%s\", got %d: %s\n", expected, text, status,
               lb2_last_error());
  ++failures;
}

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s [%s]\n", what, lb2_last_error());
  ++failures;
}

void test_accepted() {
  Layer layer;
  expect(lb2_linear_forward_cpu(&layer.args) == LB2_OK, "the unspoilt layer must run");
  layer.args.m = 0;
  layer.args.input = nullptr;
  layer.args.output = nullptr;
  layer.args.workspace = nullptr;
  expect(lb2_linear_forward_cpu(&layer.args) == LB2_OK, "no tokens need no buffers");
}

void test_layer_checks() {
  expect_refusal("struct_size", [](Layer& l) { l.args.struct_size = 8; });
  expect_refusal("dtype must be", [](Layer& l) { l.args.dtype = LB2_INT8; });
  expect_refusal("dtype must be", [](Layer& l) { l.args.dtype = -1; });
  expect_refusal("m must be between 0", [](Layer& l) { l.args.m = -1; });
  expect_refusal("m must be between 0", [](Layer& l) { l.args.m = int64_t{1} << 31; });
  expect_refusal("k must be between 1", [](Layer& l) { l.args.k = 0; });
  expect_refusal("k must be between 1", [](Layer& l) { l.args.k = INT64_MAX; });
  expect_refusal("n must be between 1", [](Layer& l) { l.args.n = -5; });
  expect_refusal("paths must not be NULL", [](Layer& l) { l.args.paths = nullptr; });
  expect_refusal("num_paths must be between 1 and 16, got 0", [](Layer& l) { l.args.num_paths = 0; });
  expect_refusal("num_paths", [](Layer& l) { l.args.num_paths = 17; });
  expect_refusal("isa", [](Layer& l) { l.args.isa = 99; });
  expect_refusal("isa", [](Layer& l) { l.args.isa = -1; });
}

void test_path_checks() {
  expect_refusal("paths[1].v must not be NULL", [](Layer& l) { l.paths[1].v = nullptr; });
  expect_refusal("paths[0].in_scale must not be NULL", [](Layer& l) { l.paths[0].in_scale = nullptr; });
  expect_refusal("paths[0].out_scale must not be NULL", [](Layer& l) { l.paths[0].out_scale = nullptr; });
  expect_refusal("paths[1].u must be given like paths[0].u", [](Layer& l) { l.paths[1].u = nullptr; });
  expect_refusal("paths[1].u must be NULL like paths[0].u", [](Layer& l) {
    l.paths[0].u = nullptr;
    l.paths[0].latent_scale = nullptr;
    l.paths[0].rank = Layer::kN;
  });
  expect_refusal("paths[1].latent_scale", [](Layer& l) { l.paths[1].latent_scale = nullptr; });
  expect_refusal("paths[0].rank must be between 1", [](Layer& l) { l.paths[0].rank = 0; });
  expect_refusal("paths[0].rank must be a multiple of 8, got 12", [](Layer& l) { l.paths[0].rank = 12; });
  expect_refusal("paths[0].v_stride must be >= 2", [](Layer& l) { l.paths[0].v_stride = 1; });
  expect_refusal("paths[0].v_stride = ", [](Layer& l) { l.paths[0].v_stride = INT64_MAX / 2; });
  expect_refusal("paths[1].u_stride must be >= 1", [](Layer& l) { l.paths[1].u_stride = -1; });
  expect_refusal("paths[0].rank must equal n = 9 for a single-stage path, got 8", [](Layer& l) {
    l.args.num_paths = 1;
    l.paths[0].u = nullptr;
    l.paths[0].latent_scale = nullptr;
  });
}

lb2_layer_shape good_shape() {
  lb2_layer_shape shape = {};
  shape.struct_size = sizeof shape;
  shape.k = 40;
  shape.n = 9;
  shape.num_paths = 3;
  for (int p = 0; p < 3; ++p) shape.ranks[p] = 8, shape.shares[p] = p;
  return shape;
}

void expect_shape_refusal(const char* text, const std::function<void(lb2_layer_shape&)>& spoil) {
  lb2_layer_shape shape = good_shape();
  spoil(shape);
  lb2_cpu_plan plan = {};
  plan.struct_size = sizeof plan;
  const lb2_status status = lb2_linear_plan_cpu(&shape, 1, LB2_ISA_AUTO, &plan);
  expect(status == LB2_ERROR_INVALID_ARGUMENT && std::strstr(lb2_last_error(), text) != nullptr, text);
}

// Every value of a shape, by planning.
void test_shape_checks() {
  expect_shape_refusal("shape->struct_size must equal", [](lb2_layer_shape& s) { s.struct_size = 8; });
  expect_shape_refusal("k must be between 1 and 2147483647, got 0", [](lb2_layer_shape& s) { s.k = 0; });
  expect_shape_refusal("k must be between 1", [](lb2_layer_shape& s) { s.k = INT64_MAX; });
  expect_shape_refusal("n must be between 1 and 2147483647, got -5", [](lb2_layer_shape& s) { s.n = -5; });
  expect_shape_refusal("num_paths must be between 1 and 16, got 0",
                       [](lb2_layer_shape& s) { s.num_paths = 0; });
  expect_shape_refusal("num_paths must be between 1 and 16, got 17",
                       [](lb2_layer_shape& s) { s.num_paths = 17; });
  expect_shape_refusal("single_stage must be 0 or 1, got 2", [](lb2_layer_shape& s) { s.single_stage = 2; });
  expect_shape_refusal("ranks[1] must be between 1 and 2147483647, got 0",
                       [](lb2_layer_shape& s) { s.ranks[1] = 0; });
  expect_shape_refusal("ranks[2] must be a multiple of 8, got 12",
                       [](lb2_layer_shape& s) { s.ranks[2] = 12; });
  expect_shape_refusal("ranks[0] must equal n = 9 for a single-stage path, got 8",
                       [](lb2_layer_shape& s) { s.single_stage = 1; });
  for (const int32_t leader : {-1, 2, 16})  // paths that are not there, or not earlier
    expect_shape_refusal("shares[1] must name path 1 itself or an earlier unshared path of rank 8, got",
                         [=](lb2_layer_shape& s) { s.shares[1] = leader; });
  expect_shape_refusal("shares[2] must name path 2 itself or an earlier unshared path of rank 8, got 1",
                       [](lb2_layer_shape& s) { s.shares[1] = 0, s.shares[2] = 1; });
  expect_shape_refusal("shares[1] must name path 1 itself or an earlier unshared path of rank 16, got 0",
                       [](lb2_layer_shape& s) { s.ranks[1] = 16, s.shares[1] = 0; });

  lb2_cpu_plan plan = {};
  plan.struct_size = sizeof plan;
  lb2_layer_shape shape = good_shape();
  const auto refused = [](lb2_status status, const char* text) {
    expect(status == LB2_ERROR_INVALID_ARGUMENT && std::strstr(lb2_last_error(), text) != nullptr, text);
  };
  refused(lb2_linear_plan_cpu(nullptr, 1, LB2_ISA_AUTO, &plan), "shape must not be NULL");
  refused(lb2_linear_plan_cpu(&shape, -1, LB2_ISA_AUTO, &plan), "m must be between 0");
  refused(lb2_linear_plan_cpu(&shape, int64_t{1} << 31, LB2_ISA_AUTO, &plan), "m must be between 0");
  refused(lb2_linear_plan_cpu(&shape, 1, 99, &plan), "isa");
  refused(lb2_linear_plan_cpu(&shape, 1, LB2_ISA_AUTO, nullptr), "plan must not be NULL");
  plan.struct_size = 0;
  refused(lb2_linear_plan_cpu(&shape, 1, LB2_ISA_AUTO, &plan), "plan->struct_size must equal");
  plan.struct_size = sizeof plan;
  // Entries past num_paths are not read.
  shape.ranks[3] = -1;
  shape.shares[3] = -1;
  shape.shares[2] = 0;
  expect(lb2_linear_plan_cpu(&shape, 2, LB2_ISA_AUTO, &plan) == LB2_OK, "a good shape");
  expect(plan.first_stages == 2 && plan.macs == 2 * (40 * 16 + 9 * 24), "shared first stages count once");
}

void test_shape_of_args() {
  Layer layer;
  lb2_layer_shape shape = {};
  expect(lb2_linear_shape(&layer.args, nullptr) == LB2_ERROR_INVALID_ARGUMENT, "shape: NULL");
  expect(lb2_linear_shape(&layer.args, &shape) == LB2_ERROR_INVALID_ARGUMENT, "shape: struct_size is 0");
  shape.struct_size = sizeof shape;
  expect(lb2_linear_shape(nullptr, &shape) == LB2_ERROR_INVALID_ARGUMENT, "shape: args is NULL");
  layer.args.input = nullptr;  // data is not looked at
  expect(lb2_linear_shape(&layer.args, &shape) == LB2_OK, "shape of a layer");
  expect(shape.k == Layer::kK && shape.n == Layer::kN && shape.num_paths == 2 && shape.single_stage == 0 &&
             shape.ranks[0] == Layer::kR && shape.ranks[1] == Layer::kR && shape.ranks[2] == 0,
         "sizes of a layer");
  const auto shared = [&] { return lb2_linear_shape(&layer.args, &shape) == LB2_OK && shape.shares[1] == 0; };
  expect(shared(), "equal v, v_stride, in_scale and rank are shared");
  std::vector<float> other_scale = layer.in_scale;  // equal in value
  layer.paths[1].in_scale = other_scale.data();
  expect(!shared() && shape.shares[1] == 1, "another in_scale is not shared");
  layer.paths[1].in_scale = layer.paths[0].in_scale;
  layer.paths[1].v_stride = 3;
  expect(!shared(), "another v_stride is not shared");
  layer.paths[1].v_stride = 2;
  layer.paths[1].rank = 16;
  expect(!shared(), "another rank is not shared");
  layer.paths[1].rank = 8;
  layer.paths[1].v = layer.single.data();
  expect(!shared(), "another v is not shared");
}

void test_buffer_checks() {
  expect_refusal("input must not be NULL", [](Layer& l) { l.args.input = nullptr; });
  expect_refusal("output must not be NULL", [](Layer& l) { l.args.output = nullptr; });
  expect_refusal("input_stride must be >= 0", [](Layer& l) { l.args.input_stride = -1; });
  expect_refusal("output_stride must be >= 9, got 8", [](Layer& l) { l.args.output_stride = 8; });
  expect_refusal("input_stride", [](Layer& l) { l.args.input_stride = INT64_MAX; });
  expect_refusal("output_stride", [](Layer& l) { l.args.output_stride = INT64_MAX / 2; });
  expect_refusal("workspace must not be NULL", [](Layer& l) { l.args.workspace = nullptr; });
  expect_refusal("workspace_bytes must be >= ", [](Layer& l) { l.args.workspace_bytes = 10; });
  expect_refusal(
      "parallel_for failed with code 7",
      [](Layer& l) {
        // Enough rows that the work is handed out.
        l.args.parallel_for = [](void*, int64_t, int64_t, lb2_task, void*) -> int32_t { return 7; };
        static std::vector<int32_t> u(1 << 16);
        static std::vector<float> scale(1 << 16), y(2 << 16);
        for (lb2_path& path : l.paths) path.u = u.data(), path.out_scale = scale.data();
        l.args.n = 1 << 16;
        l.args.output = y.data();
        l.args.output_stride = 1 << 16;
      },
      LB2_ERROR_INTERNAL);
}

void test_signs() {
  uint8_t negative[4] = {};
  int32_t word = 0;
  float out[4];
  expect(lb2_pack_signs(nullptr, 4, 1, 4, &word, 1) == LB2_ERROR_INVALID_ARGUMENT, "pack: negative is NULL");
  expect(lb2_pack_signs(negative, 4, -1, 4, &word, 1) == LB2_ERROR_INVALID_ARGUMENT, "pack: rows < 0");
  expect(lb2_pack_signs(negative, 4, 2, 4, &word, 0) == LB2_ERROR_INVALID_ARGUMENT, "pack: words_stride");
  expect(lb2_pack_signs(negative, 3, 2, 4, &word, 1) == LB2_ERROR_INVALID_ARGUMENT, "pack: negative_stride");
  expect(lb2_pack_signs(negative, 0, 1, INT64_MAX, &word, 0) == LB2_ERROR_INVALID_ARGUMENT,
         "pack: huge cols");
  expect(lb2_pack_signs(negative, 4, INT64_MAX, 4, &word, 1) == LB2_ERROR_INVALID_ARGUMENT,
         "pack: huge rows");
  expect(lb2_pack_signs(negative, INT64_MAX, 4, 4, &word, 1) == LB2_ERROR_INVALID_ARGUMENT, "pack: overflow");
  expect(lb2_unpack_signs(&word, 1, 1, 4, 17, out, 4) == LB2_ERROR_INVALID_ARGUMENT, "unpack: dtype");
  expect(lb2_unpack_signs(&word, 1, 1, 4, LB2_FLOAT32, nullptr, 4) == LB2_ERROR_INVALID_ARGUMENT,
         "unpack: out");
  expect(lb2_pack_signs(nullptr, 0, 0, 0, nullptr, 0) == LB2_OK, "pack: nothing to do");
}

void test_queries() {
  expect(lb2_linear_forward_cpu(nullptr) == LB2_ERROR_INVALID_ARGUMENT, "forward: args is NULL");
  expect(lb2_linear_backward_x_cpu(nullptr) == LB2_ERROR_INVALID_ARGUMENT, "backward: args is NULL");
  expect(lb2_cpu_isa(nullptr) == LB2_ERROR_INVALID_ARGUMENT, "isa is NULL");
  expect(lb2_cpu_set_isa(42) == LB2_ERROR_INVALID_ARGUMENT, "set_isa: unknown");
  expect(std::strcmp(lb2_isa_name(42), "unknown") == 0 && std::strcmp(lb2_isa_name(-1), "unknown") == 0,
         "isa_name");
  expect(lb2_cpu_isa_available(LB2_ISA_SCALAR) == 1 && lb2_cpu_isa_available(42) == 0, "isa_available");
  lb2_cpu_plan plan = {};
  plan.struct_size = sizeof plan;
  lb2_layer_shape huge = good_shape();
  huge.k = huge.n = INT32_MAX;
  for (int p = 0; p < 3; ++p) huge.ranks[p] = 2147483640;
  expect(lb2_linear_plan_cpu(&huge, INT32_MAX, LB2_ISA_AUTO, &plan) == LB2_OK && plan.macs == INT64_MAX,
         "huge plans saturate");
}

// The prepacked layer of a Layer, and the arguments of a call on it.
struct Prepacked {
  Layer layer;
  std::vector<char> bytes;
  lb2_prepacked_args args = {};

  Prepacked() {
    int64_t size = 0;
    expect(lb2_prepacked_bytes_cpu(&layer.args, &size) == LB2_OK, "bytes of the unspoilt layer");
    bytes.resize(static_cast<size_t>(size));
    expect(lb2_prepack_cpu(&layer.args, bytes.data(), size) == LB2_OK, "prepack the unspoilt layer");
    args.struct_size = sizeof args;
    args.layer = bytes.data();
    args.layer_bytes = size;
    args.m = Layer::kM;
    args.input = layer.x.data();
    args.input_stride = Layer::kK;
    args.output = layer.y.data();
    args.output_stride = Layer::kN;
    args.workspace = layer.workspace.data();
    args.workspace_bytes = static_cast<int64_t>(layer.workspace.size());
  }
};

void expect_prepacked_refusal(const char* text, const std::function<void(Prepacked&)>& spoil) {
  Prepacked prepacked;
  spoil(prepacked);
  const lb2_status status = lb2_prepacked_forward_cpu(&prepacked.args);
  expect(status == LB2_ERROR_INVALID_ARGUMENT && std::strstr(lb2_last_error(), text) != nullptr, text);
}

void test_prepacked_checks() {
  Prepacked prepacked;
  prepacked.layer.workspace.resize(1 << 20);
  prepacked.args.workspace = prepacked.layer.workspace.data();
  prepacked.args.workspace_bytes = 1 << 20;
  expect(lb2_prepacked_forward_cpu(&prepacked.args) == LB2_OK, "the unspoilt prepacked layer must run");
  expect(lb2_prepacked_forward_cpu(nullptr) == LB2_ERROR_INVALID_ARGUMENT, "prepacked forward: args is NULL");
  expect_prepacked_refusal("struct_size", [](Prepacked& p) { p.args.struct_size = 8; });
  expect_prepacked_refusal("layer must not be NULL", [](Prepacked& p) { p.args.layer = nullptr; });
  expect_prepacked_refusal("made by lb2_prepack_cpu", [](Prepacked& p) { p.args.layer_bytes = 0; });
  expect_prepacked_refusal("made by lb2_prepack_cpu", [](Prepacked& p) { p.args.layer_bytes = -1; });
  expect_prepacked_refusal("made by lb2_prepack_cpu", [](Prepacked& p) { p.bytes[0] ^= 1; });
  expect_prepacked_refusal("layer_bytes must be", [](Prepacked& p) { p.args.layer_bytes -= 64; });
  expect_prepacked_refusal("m must be", [](Prepacked& p) { p.args.m = -1; });
  expect_prepacked_refusal("dtype must be", [](Prepacked& p) { p.args.dtype = LB2_INT8; });
  expect_prepacked_refusal("activation must be", [](Prepacked& p) { p.args.activation = 5; });
  expect_prepacked_refusal("isa must be", [](Prepacked& p) { p.args.isa = 42; });
  expect_prepacked_refusal("input must not be NULL", [](Prepacked& p) { p.args.input = nullptr; });
  expect_prepacked_refusal("output_stride must be", [](Prepacked& p) { p.args.output_stride = 1; });
  expect_prepacked_refusal("workspace must not be NULL", [](Prepacked& p) { p.args.workspace = nullptr; });
  expect_prepacked_refusal("workspace_bytes must be", [](Prepacked& p) { p.args.workspace_bytes = 8; });

  int64_t size = 0;
  expect(lb2_prepacked_bytes_cpu(&prepacked.layer.args, nullptr) == LB2_ERROR_INVALID_ARGUMENT,
         "bytes is NULL");
  expect(lb2_prepack_cpu(&prepacked.layer.args, prepacked.bytes.data(), 64) == LB2_ERROR_INVALID_ARGUMENT,
         "prepack: layer_bytes");
  lb2_layer_shape shape = {};
  const auto shape_of = [&] {
    return lb2_prepacked_shape_cpu(prepacked.args.layer, prepacked.args.layer_bytes, &shape);
  };
  expect(shape_of() == LB2_ERROR_INVALID_ARGUMENT, "prepacked shape: struct_size is 0");
  shape.struct_size = sizeof shape;
  lb2_layer_shape portable = shape;
  expect(shape_of() == LB2_OK && lb2_linear_shape(&prepacked.layer.args, &portable) == LB2_OK &&
             shape.k == portable.k && shape.n == portable.n && shape.num_paths == portable.num_paths &&
             shape.single_stage == portable.single_stage &&
             std::memcmp(shape.ranks, portable.ranks, sizeof shape.ranks) == 0 &&
             std::memcmp(shape.shares, portable.shares, sizeof shape.shares) == 0,
         "the shape survives prepacking");
  expect(lb2_unprepack_cpu(prepacked.args.layer, prepacked.args.layer_bytes, 2, nullptr, nullptr, nullptr,
                           nullptr, nullptr, nullptr, nullptr) == LB2_ERROR_INVALID_ARGUMENT,
         "unprepack: path");
  Layer huge;
  huge.args.k = huge.args.n = INT32_MAX;
  for (lb2_path& path : huge.paths) path.rank = 2147483640, path.v_stride = path.u_stride = 67108864;
  // Both paths pass one in_scale, so its K values, which are not there, need not be compared.
  expect(lb2_prepacked_bytes_cpu(&huge.args, &size) == LB2_ERROR_INVALID_ARGUMENT,
         "huge layers do not overflow");
}

}  // namespace

int main() {
  test_accepted();
  test_layer_checks();
  test_path_checks();
  test_shape_checks();
  test_shape_of_args();
  test_buffer_checks();
  test_signs();
  test_queries();
  test_prepacked_checks();
  return failures != 0;
}
