// Random dense int8 layers against a double reference, on every instruction set this machine runs, over a
// parallel_for that splits ranges unevenly. All instruction sets must agree to the bit. Wrong arguments.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "littlebit2/littlebit2.h"
#include "random_problem.h"

namespace {

// Rows of `cols` elements, `stride` apart.
int64_t extent(int64_t rows, int64_t cols, int64_t stride) {
  return rows == 0 ? 0 : (rows - 1) * stride + cols;
}

bool run_problem(int index) {
  const auto spare = [] { return static_cast<int64_t>(engine() % 5); };
  const int64_t off = engine() % 2;
  const lb2_dtype dtype = static_cast<lb2_dtype>(pick({LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16}));
  const int64_t element = element_bytes(dtype);
  const int64_t m = pick({0, 1, 1, 2, 3, 5, 6, 7, 13, 16, 17, 40});
  const int64_t k = pick({1, 5, 15, 16, 17, 100, 1023, 1024, 1025, 2100});
  const int64_t n = pick({1, 2, 3, 4, 5, 15, 16, 17, 63, 130});
  const int64_t weight_stride = k + spare(), input_stride = k + spare(), output_stride = n + spare();
  const bool with_bias = engine() % 2;
  std::vector<int8_t> values(static_cast<size_t>(extent(n, k, weight_stride)));
  for (int8_t& value : values) value = static_cast<int8_t>(engine());
  const std::vector<float> scales = random_floats(n), biases = random_floats(n);
  const Buffer weight = copy_out(values, off), scale = copy_out(scales, off), bias = copy_out(biases, off);
  const Buffer input(extent(m, k, input_stride) * element, off);
  for (int64_t i = 0; i < extent(m, k, input_stride); ++i) random_element(dtype, input.data + i * element);

  std::vector<char> first_result;
  for (const lb2_isa isa : kIsas) {
    if (!lb2_cpu_isa_available(isa)) continue;
    const size_t output_bytes = static_cast<size_t>(extent(m, n, output_stride) * element);
    const Buffer output = copy_out(std::vector<char>(output_bytes, 0x5A), off);
    lb2_int8_args args = {};
    args.struct_size = sizeof args;
    args.m = m;
    args.k = k;
    args.n = n;
    args.weight = reinterpret_cast<const int8_t*>(weight.data);
    args.weight_stride = weight_stride;
    args.scale = reinterpret_cast<const float*>(scale.data);
    args.bias = with_bias ? reinterpret_cast<const float*>(bias.data) : nullptr;
    args.input = input.data;
    args.input_stride = input_stride;
    args.output = output.data;
    args.output_stride = output_stride;
    args.dtype = dtype;
    args.isa = isa;
    if (engine() % 2) args.parallel_for = parallel_for;
    int64_t bytes = -1;
    if (lb2_int8_workspace_cpu(m, k, &bytes) != LB2_OK) return false;
    const Buffer workspace(bytes, bytes > 0 ? off : 0);
    args.workspace = workspace.data;
    args.workspace_bytes = bytes;
    if (lb2_int8_forward_cpu(&args) != LB2_OK) {
      std::fprintf(stderr, "problem %d: %s: %s\n", index, lb2_isa_name(isa), lb2_last_error());
      return false;
    }
    double error = 0.0, norm = 0.0;
    for (int64_t t = 0; t < m; ++t)
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0.0, squares = 0.0;
        for (int64_t c = 0; c < k; ++c) {
          const double product = values[static_cast<size_t>(i * weight_stride + c)] *
                                 decode(dtype, input.data + (t * input_stride + c) * element);
          sum += product;
          squares += product * product;
        }
        const double truth = sum * scales[i] + (with_bias ? biases[i] : 0.0f);
        const double got = decode(dtype, output.data + (t * output_stride + i) * element);
        error += (got - truth) * (got - truth);
        norm += std::max(truth * truth, squares * scales[i] * scales[i]);
      }
    if (!(std::sqrt(error) <= tolerance(dtype) * std::sqrt(norm))) {
      std::fprintf(stderr, "problem %d: %s: m %ld k %ld n %ld: relative error %.2e\n", index,
                   lb2_isa_name(isa), static_cast<long>(m), static_cast<long>(k), static_cast<long>(n),
                   std::sqrt(error / norm));
      return false;
    }
    // Unwritten bytes between the rows are compared too.
    const std::vector<char> result(output.data, output.data + output_bytes);
    if (isa == LB2_ISA_SCALAR) add_to_digest(first_result = result);
    if (result != first_result) {
      std::fprintf(stderr, "problem %d: %s and scalar differ in their bits\n", index, lb2_isa_name(isa));
      return false;
    }
    for (int64_t t = 0; t + 1 < m; ++t)
      for (int64_t b = n * element; b < output_stride * element; ++b)
        if (result[static_cast<size_t>(t * output_stride * element + b)] != 0x5A) {
          std::fprintf(stderr, "problem %d: %s wrote between the rows\n", index, lb2_isa_name(isa));
          return false;
        }
  }
  return true;
}

bool refuses(const char* part, void (*change)(lb2_int8_args*)) {
  static const int8_t weight[6] = {};
  static const float scale[2] = {}, input[3] = {};
  static float output[2];
  static char workspace[256];
  lb2_int8_args args = {};
  args.struct_size = sizeof args;
  args.m = 1;
  args.k = 3;
  args.n = 2;
  args.weight = weight;
  args.weight_stride = 3;
  args.scale = scale;
  args.input = input;
  args.input_stride = 3;
  args.output = output;
  args.output_stride = 2;
  args.workspace = workspace;
  args.workspace_bytes = sizeof workspace;
  return refuses(lb2_int8_forward_cpu, args, part, change);
}

}  // namespace

int main(int argc, char** argv) {
  int failed = run_problems(argc, argv, problem_count(300), run_problem);
  failed += !refuses("struct_size must equal", [](lb2_int8_args* args) { args->struct_size = 8; });
  failed += !refuses("k must be between 1", [](lb2_int8_args* args) { args->k = 0; });
  failed += !refuses("n must be between 1", [](lb2_int8_args* args) { args->n = 0; });
  failed += !refuses("m must be between 0", [](lb2_int8_args* args) { args->m = -1; });
  failed += !refuses("dtype must be", [](lb2_int8_args* args) { args->dtype = LB2_INT8; });
  failed += !refuses("weight must not be NULL", [](lb2_int8_args* args) { args->weight = nullptr; });
  failed += !refuses("weight_stride must be >= 3", [](lb2_int8_args* args) { args->weight_stride = 2; });
  failed += !refuses("scale must not be NULL", [](lb2_int8_args* args) { args->scale = nullptr; });
  failed += !refuses("input must not be NULL", [](lb2_int8_args* args) { args->input = nullptr; });
  failed += !refuses("output must not be NULL", [](lb2_int8_args* args) { args->output = nullptr; });
  failed += !refuses("workspace_bytes must be >=", [](lb2_int8_args* args) { args->workspace_bytes = 1; });
  if (lb2_int8_forward_cpu(nullptr) != LB2_ERROR_INVALID_ARGUMENT) ++failed;
  if (lb2_int8_workspace_cpu(1, 1, nullptr) != LB2_ERROR_INVALID_ARGUMENT) ++failed;
  return failed != 0;
}
