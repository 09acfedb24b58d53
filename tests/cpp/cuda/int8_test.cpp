// The int8 kernel executed on the host, against float64: ragged columns and rows, misaligned weights,
// strides.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/call.h"

namespace {

struct Int8Problem {
  lb2_int8_args args = {};
  std::vector<float> scale, bias;
  Buffer weight{0, 0}, input{0, 0};
  std::vector<double> expected, typical;  // [m, n]

  Int8Problem(int64_t m, int64_t k, int64_t n, lb2_dtype dtype, int64_t offset)
      : scale(random_floats(n)), bias(random_floats(n)) {
    args.struct_size = sizeof args;
    args.m = m;
    args.k = k;
    args.n = n;
    args.dtype = dtype;
    args.weight_stride = k + pick({0, 0, 5, 16 - k % 16});
    args.input_stride = k + pick({0, 3});
    args.output_stride = n + pick({0, 2});
    std::vector<int8_t> rows(static_cast<size_t>((n - 1) * args.weight_stride + k));
    for (int8_t& value : rows) value = static_cast<int8_t>(engine());
    weight = copy_out(rows, offset);
    const int64_t element = element_bytes(dtype), elements = (m - 1) * args.input_stride + k;
    std::vector<char> x(static_cast<size_t>(elements * element));
    for (int64_t i = 0; i < elements; ++i) random_element(dtype, x.data() + i * element);
    input = copy_out(x, element * (offset > 0));
    args.weight = reinterpret_cast<const int8_t*>(weight.data);
    args.input = input.data;
    args.scale = scale.data();
    if (engine() % 2 == 0) args.bias = bias.data();
    for (int64_t t = 0; t < m; ++t)
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0.0, squares = 0.0;
        for (int64_t c = 0; c < k; ++c) {
          const double product = rows[static_cast<size_t>(i * args.weight_stride + c)] *
                                 decode(dtype, x.data() + (t * args.input_stride + c) * element);
          sum += product;
          squares += product * product;
        }
        const double row_scale = scale[static_cast<size_t>(i)];
        expected.push_back(sum * row_scale + (args.bias != nullptr ? bias[static_cast<size_t>(i)] : 0.0f));
        typical.push_back(std::sqrt(squares) * std::fabs(row_scale));
      }
  }

  // Runs tokens [first, first + count) and returns what is stored.
  std::vector<char> run(int64_t first, int64_t count, lb2::cuda::Order order) {
    lb2::cuda::host::Runtime& gpu = lb2::cuda::host::runtime();
    gpu.order = order;
    gpu.written.clear();
    gpu.layer.clear();
    const int64_t element = element_bytes(args.dtype);
    std::vector<char> y(static_cast<size_t>(((count - 1) * args.output_stride + args.n) * element), 0x5A);
    const Buffer output = copy_out(y, 0);
    lb2_int8_args call = args;
    call.m = count;
    call.input = input.data + first * args.input_stride * element;
    call.output = output.data;
    if (lb2_int8_forward_cuda(&call, nullptr) != LB2_OK) {
      std::fprintf(stderr, "%s\n", lb2_last_error());
      std::abort();
    }
    std::memcpy(y.data(), output.data, y.size());
    return y;
  }
};

bool run_problem(int index) {
  const lb2_dtype dtype = static_cast<lb2_dtype>(index % 3);
  const int64_t m = pick({1, 1, 2, 3, 4, 5, 8, 9, 16, 21}), k = pick({1, 15, 16, 100, 512, 513, 1600, 2560});
  const int64_t n = pick({1, 3, 31, 32, 70}), offset = pick({0, 1, 4});
  Int8Problem problem(m, k, n, dtype, offset);
  const std::vector<char> y = problem.run(0, m, lb2::cuda::Order::kForward);
  const int64_t element = element_bytes(dtype);
  double error = 0.0, norm = 0.0;
  for (int64_t t = 0; t < m; ++t)
    for (int64_t i = 0; i < problem.args.output_stride &&
                        t * problem.args.output_stride + i < static_cast<int64_t>(y.size()) / element;
         ++i) {
      const char* cell = y.data() + (t * problem.args.output_stride + i) * element;
      if (i >= n) {
        if (cell[0] == 0x5A && cell[1] == 0x5A) continue;
        std::fprintf(stderr, "problem %d: something was written between rows\n", index);
        return false;
      }
      const size_t at = static_cast<size_t>(t * n + i);
      error += std::pow(decode(dtype, cell) - problem.expected[at], 2);
      norm += std::pow(problem.expected[at], 2) + std::pow(problem.typical[at], 2);
    }
  const double most = tolerance(dtype) * (1.0 + 3.0 / std::sqrt(static_cast<double>(m * n)));
  if (!(std::sqrt(error / norm) <= most)) {
    std::fprintf(stderr, "problem %d: m=%d k=%d n=%d dtype %d: error %.2e, at most %.2e\n", index,
                 static_cast<int>(m), static_cast<int>(k), static_cast<int>(n), static_cast<int>(dtype),
                 std::sqrt(error / norm), most);
    return false;
  }
  if (problem.run(0, m, lb2::cuda::Order::kShuffled) != y) {
    std::fprintf(stderr, "problem %d: the order of threads changes the result\n", index);
    return false;
  }
  // A token alone, which takes another tile.
  const std::vector<char> last = problem.run(m - 1, 1, lb2::cuda::Order::kForward);
  if (std::memcmp(last.data(), y.data() + (m - 1) * problem.args.output_stride * element, last.size()) == 0)
    return true;
  std::fprintf(stderr, "problem %d: a token's result depends on the others\n", index);
  return false;
}

bool refuses(const lb2_int8_args& args, const char* part) {
  if (lb2_int8_forward_cuda(&args, nullptr) == LB2_ERROR_INVALID_ARGUMENT &&
      std::strstr(lb2_last_error(), part) != nullptr)
    return true;
  std::fprintf(stderr, "not refused with '%s': %s\n", part, lb2_last_error());
  return false;
}

bool run_errors() {
  std::vector<char> y(64);
  Int8Problem problem(1, 20, 4, LB2_FLOAT32, 0);
  problem.args.output = y.data();
  lb2_int8_args args = problem.args;
  args.output = y.data() + 1;
  bool good = refuses(args, "output must be aligned to 4 bytes");
  args = problem.args;
  args.scale = nullptr;
  good = refuses(args, "scale must not be NULL") && good;
  args = problem.args;
  args.weight_stride = 3;
  good = refuses(args, "weight") && good;
  args = problem.args;
  args.m = 0;
  args.output = nullptr;
  return lb2_int8_forward_cuda(&args, nullptr) == LB2_OK && good;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : problem_count(90);
  for (int i = 0; i < count; ++i)
    if (!run_problem(i)) return EXIT_FAILURE;
  if (!run_errors()) return EXIT_FAILURE;
  std::printf("%d problems passed\n", count);
  return EXIT_SUCCESS;
}
