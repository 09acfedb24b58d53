// Random problems on the prepacked layout: the round trip of the layout, and the call in every mode of
// activation and on every instruction set, which must agree to the bit. Damaged layers, which must be
// refused. Sums at the limits of their integers.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "littlebit2/littlebit2.h"
#include "random_problem.h"

namespace {

bool failed_call(int index, const char* what, lb2_status status) {
  if (status == LB2_OK) return false;
  std::fprintf(stderr, "problem %d: %s: %s\n", index, what, lb2_last_error());
  return true;
}

bool same_signs(const std::vector<double>& dense, const std::vector<int32_t>& words, int64_t rows,
                int64_t cols) {
  const int64_t pitch = lb2_words_per_row(cols);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < pitch * 32; ++c) {
      const bool negative = (static_cast<uint32_t>(words[r * pitch + c / 32]) >> (c % 32)) & 1u;
      if (negative != (c < cols && dense[r * cols + c] < 0.0)) return false;  // pad bits are zero
    }
  return true;
}

bool round_trip(int index, const Problem& problem, const Buffer& layer, int64_t bytes) {
  lb2_layer_shape shape = {};
  shape.struct_size = sizeof shape;
  if (failed_call(index, "shape", lb2_prepacked_shape_cpu(layer.data, bytes, &shape))) return false;
  // What was shared still is; paths of a single stage never are.
  bool same = shape.k == problem.k && shape.n == problem.n && shape.num_paths == problem.num_paths &&
              shape.single_stage == problem.single_stage;
  for (int64_t p = 0; p < problem.num_paths && same; ++p) {
    const Path& path = problem.paths[p];
    const bool shared = !problem.single_stage && problem.args_paths[0].v == problem.args_paths[p].v;
    same = shape.ranks[p] == path.rank && shape.shares[p] == (shared ? 0 : p);
    std::vector<int32_t> v(static_cast<size_t>(path.rank * lb2_words_per_row(problem.k)), -1);
    std::vector<int32_t> u(static_cast<size_t>(problem.n * lb2_words_per_row(path.rank)), -1);
    std::vector<float> in_scale(static_cast<size_t>(problem.k)), out_scale(static_cast<size_t>(problem.n));
    std::vector<float> latent_scale(static_cast<size_t>(path.rank));
    const bool two = !problem.single_stage;
    if (failed_call(
            index, "unprepack",
            lb2_unprepack_cpu(layer.data, bytes, p, v.data(), two ? u.data() : nullptr, in_scale.data(),
                              two ? latent_scale.data() : nullptr, out_scale.data(), parallel_for, nullptr)))
      return false;
    same = same && same_signs(path.v, v, path.rank, problem.k) && in_scale == path.in_scale &&
           out_scale == path.out_scale;
    if (two) same = same && same_signs(path.u, u, problem.n, path.rank) && latent_scale == path.latent_scale;
  }
  if (!same) {
    std::fprintf(stderr, "problem %d: the layer changed on its way through the prepacked layout\n", index);
    problem.describe();
  }
  return same;
}

// Largest relative error of a mode. The 8-bit and 1-bit ones are approximations: only their agreement is
// tested here.
double allowed(lb2_activation activation, const Problem& problem) {
  if (activation == LB2_ACTIVATION_EXACT) return tolerance(problem.dtype);
  // Few terms can cancel below what random signs give; the Python sweep has the tight bound.
  if (activation == LB2_ACTIVATION_INT16) return tolerance(problem.dtype) + 5e-3;
  if (activation == LB2_ACTIVATION_INT8X2) return tolerance(problem.dtype) + 5e-4;
  return INFINITY;
}

bool run_modes(int index, const Problem& problem, const Buffer& layer, int64_t bytes) {
  for (const lb2_activation activation : kCpuModes) {
    std::vector<char> first_result;
    for (const lb2_isa isa : kIsas) {
      if (!serves(isa, activation)) continue;
      const size_t output_bytes = static_cast<size_t>(problem.output_elements() * problem.element);
      const Buffer output = copy_out(std::vector<char>(output_bytes, 0x5A), problem.misaligned);
      lb2_prepacked_args args = {};
      args.struct_size = sizeof args;
      args.layer = layer.data;
      args.layer_bytes = bytes;
      args.m = problem.m;
      args.bias = problem.bias_data();
      args.input = problem.input.data;
      args.input_stride = problem.input_stride;
      args.output = output.data;
      args.output_stride = problem.output_stride;
      args.dtype = problem.dtype;
      args.activation = activation;
      args.isa = isa;
      args.num_threads = static_cast<int32_t>(engine() % 5);
      if (engine() % 2) args.parallel_for = parallel_for;
      lb2_prepacked_plan plan = {};
      plan.struct_size = sizeof plan;
      if (failed_call(index, "plan", lb2_prepacked_plan_cpu(&args, &plan))) return false;
      const Buffer workspace(plan.workspace_bytes, problem.misaligned && plan.workspace_bytes > 0);
      args.workspace = workspace.data;
      args.workspace_bytes = plan.workspace_bytes;
      if (failed_call(index, lb2_isa_name(isa), lb2_prepacked_forward_cpu(&args))) return false;
      const double error = problem.error_of(output.data);
      if (!(error <= allowed(activation, problem))) {
        std::fprintf(stderr, "problem %d: %s, activation %d: relative error %.2e\n", index, lb2_isa_name(isa),
                     static_cast<int>(activation), error);
        problem.describe();
        return false;
      }
      const std::vector<char> result(output.data, output.data + output_bytes);
      if (isa == LB2_ISA_SCALAR) add_to_digest(first_result = result);
      if (activation != LB2_ACTIVATION_INT8X2 && result != first_result) {
        std::fprintf(stderr, "problem %d: %s and scalar differ in their bits in activation %d\n", index,
                     lb2_isa_name(isa), static_cast<int>(activation));
        problem.describe();
        return false;
      }
    }
  }
  return true;
}

// Whatever happens to the header, the calls must refuse the layer, or find one of the same size in it and
// stay inside.
bool survives_damage(const Buffer& layer, int64_t bytes) {
  for (int i = 0; i < 64; ++i) {
    const int64_t length =
        engine() % 3 ? bytes : static_cast<int64_t>(engine() % static_cast<uint64_t>(bytes));
    Buffer damaged(length, false);
    std::memcpy(damaged.data, layer.data, static_cast<size_t>(length));
    for (int flips = 0; flips < 3 && length > 0; ++flips)
      damaged.data[engine() % static_cast<uint64_t>(std::min<int64_t>(length, 80))] ^=
          static_cast<char>(1u << engine() % 8);
    lb2_layer_shape shape = {};
    shape.struct_size = sizeof shape;
    const lb2_status status = lb2_prepacked_shape_cpu(damaged.data, length, &shape);
    if (status != LB2_OK && status != LB2_ERROR_INVALID_ARGUMENT) return false;
    if (status != LB2_OK) continue;
    if (length != bytes) return false;
    const std::vector<float> x(static_cast<size_t>(shape.k), 1.0f);
    std::vector<float> y(static_cast<size_t>(shape.n));
    lb2_prepacked_args args = {};
    args.struct_size = sizeof args;
    args.layer = damaged.data;
    args.layer_bytes = length;
    args.m = 1;
    args.input = x.data();
    args.output = y.data();
    lb2_prepacked_plan plan = {};
    plan.struct_size = sizeof plan;
    if (lb2_prepacked_plan_cpu(&args, &plan) != LB2_OK) return false;
    const Buffer workspace(plan.workspace_bytes, false);
    args.workspace = workspace.data;
    args.workspace_bytes = plan.workspace_bytes;
    if (lb2_prepacked_forward_cpu(&args) != LB2_OK) return false;
  }
  return true;
}

bool run_problem(int index) {
  const Problem problem(false);
  lb2_linear_args args = problem.layer_args();
  if (engine() % 2) args.parallel_for = parallel_for;
  int64_t bytes = 0;
  if (failed_call(index, "bytes", lb2_prepacked_bytes_cpu(&args, &bytes))) return false;
  const Buffer layer(bytes, problem.misaligned);
  if (failed_call(index, "prepack", lb2_prepack_cpu(&args, layer.data, bytes))) return false;
  if (!round_trip(index, problem, layer, bytes) || !run_modes(index, problem, layer, bytes)) return false;
  if (survives_damage(layer, bytes)) return true;
  std::fprintf(stderr, "problem %d: a damaged layer was taken for a whole one\n", index);
  return false;
}

// Rows whose signs are those of the activations or their opposites: sums of windows reach the bound that
// integers are scaled by. Few columns carry almost all of it, or all alike.
bool run_extreme(int index) {
  const int64_t k = pick({5, 15, 30, 45, 60, 721, 1500}), n = 70;
  const lb2_activation activation =
      static_cast<lb2_activation>(pick({LB2_ACTIVATION_INT16, LB2_ACTIVATION_INT8}));
  std::vector<float> x = random_floats(k);
  if (engine() % 2)
    for (float& value : x) value *= engine() % 8 ? 0x1p-12f : 1.0f;
  const int64_t pitch = lb2_words_per_row(k);
  std::vector<int32_t> words(static_cast<size_t>(n * pitch), 0);
  for (int64_t r = 0; r < n; ++r) {
    // From some column on, the signs are turned: all, none or a part of them.
    const int64_t turn = r < 2 ? r * k : static_cast<int64_t>(engine() % static_cast<uint64_t>(k + 1));
    for (int64_t c = 0; c < k; ++c)
      words[r * pitch + c / 32] |=
          static_cast<int32_t>(static_cast<uint32_t>((x[c] < 0.0f) != (c >= turn)) << c % 32);
  }
  const std::vector<float> in_scale(static_cast<size_t>(k), 1.0f), out_scale(static_cast<size_t>(n), 1.0f);
  lb2_path path = {};
  path.v = words.data();
  path.v_stride = pitch;
  path.rank = n;
  path.in_scale = in_scale.data();
  path.out_scale = out_scale.data();
  lb2_linear_args layer_args = {};
  layer_args.struct_size = sizeof layer_args;
  layer_args.k = k;
  layer_args.n = n;
  layer_args.paths = &path;
  layer_args.num_paths = 1;
  int64_t bytes = 0;
  if (failed_call(index, "bytes", lb2_prepacked_bytes_cpu(&layer_args, &bytes))) return false;
  const Buffer layer(bytes, 0);
  if (failed_call(index, "prepack", lb2_prepack_cpu(&layer_args, layer.data, bytes))) return false;
  double largest = 0.0;
  for (const float value : x) largest += std::fabs(value);
  std::vector<char> first_result;
  for (const lb2_isa isa : kIsas) {
    if (!lb2_cpu_isa_available(isa)) continue;
    std::vector<float> y(static_cast<size_t>(n));
    lb2_prepacked_args args = {};
    args.struct_size = sizeof args;
    args.layer = layer.data;
    args.layer_bytes = bytes;
    args.m = 1;
    args.input = x.data();
    args.output = y.data();
    args.activation = activation;
    args.isa = isa;
    lb2_prepacked_plan plan = {};
    plan.struct_size = sizeof plan;
    if (failed_call(index, "plan", lb2_prepacked_plan_cpu(&args, &plan))) return false;
    const Buffer workspace(plan.workspace_bytes, 0);
    args.workspace = workspace.data;
    args.workspace_bytes = plan.workspace_bytes;
    if (failed_call(index, lb2_isa_name(isa), lb2_prepacked_forward_cpu(&args))) return false;
    // Row 0 is all turned, row 1 not at all. A sum that left its integers would be off by far more.
    const double error = std::max(std::fabs(y[0] + largest), std::fabs(y[1] - largest));
    if (!(error <= 0.05 * largest)) {
      std::fprintf(stderr, "extreme %d: %s, activation %d: %g and %g instead of -/+ %g\n", index,
                   lb2_isa_name(isa), static_cast<int>(activation), y[0], y[1], largest);
      return false;
    }
    const char* data = reinterpret_cast<const char*>(y.data());
    const std::vector<char> result(data, data + y.size() * 4);
    if (isa == LB2_ISA_SCALAR) add_to_digest(first_result = result);
    if (result == first_result) continue;
    std::fprintf(stderr, "extreme %d: %s and scalar differ in their bits\n", index, lb2_isa_name(isa));
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int failed = run_problems(argc, argv, 300, run_problem);
  return failed + run_problems(argc, argv, 300, run_extreme) != 0;
}
