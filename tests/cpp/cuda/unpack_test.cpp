// lb2_linear_unpack_cuda executed on the host: every element of random layers (ragged tails, misaligned
// words, several paths, garbage in pad bits) against the product of its sign and scales, in outputs of
// exactly the right size, and what it says of bad arguments.
#include "cuda/call.h"

namespace {

int failures = 0;

#define EXPECT(condition)                                                                                 \
  do {                                                                                                    \
    if (!(condition)) {                                                                                   \
      std::fprintf(stderr, "%s:%d: not so: %s [%s]\n", __FILE__, __LINE__, #condition, lb2_last_error()); \
      ++failures;                                                                                         \
    }                                                                                                     \
  } while (false)

struct Expected {
  std::vector<double> first, last;
};

Expected unpacked(const Problem& problem) {
  const size_t k = static_cast<size_t>(problem.k), n = static_cast<size_t>(problem.n);
  size_t latents = 0, before = 0;
  for (const Path& path : problem.paths) latents += static_cast<size_t>(path.rank);
  Expected expected;
  if (problem.single_stage) {
    expected.last.assign(n * k, 0.0);
    for (const Path& path : problem.paths)
      for (size_t i = 0; i < n * k; ++i)
        expected.last[i] += path.v[i] * path.out_scale[i / k] * path.in_scale[i % k];
    return expected;
  }
  expected.first.resize(latents * k);
  expected.last.resize(n * latents);
  for (const Path& path : problem.paths) {
    const size_t rank = static_cast<size_t>(path.rank);
    for (size_t i = 0; i < rank * k; ++i) expected.first[before * k + i] = path.v[i] * path.in_scale[i % k];
    for (size_t i = 0; i < n * rank; ++i)
      expected.last[i / rank * latents + before + i % rank] =
          path.u[i] * path.out_scale[i / rank] * path.latent_scale[i % rank];
    before += rank;
  }
  return expected;
}

bool close(const Problem& problem, const char* name, const Buffer& got, const std::vector<double>& expected) {
  // Half a unit in the last place; of float32, for a product and the additions of paths.
  const double relative = problem.dtype == LB2_FLOAT32   ? 2e-7 * static_cast<double>(problem.num_paths)
                          : problem.dtype == LB2_FLOAT16 ? std::ldexp(1.001, -11)
                                                         : std::ldexp(1.001, -8);
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = decode(problem.dtype, got.data + static_cast<int64_t>(i) * problem.element);
    // Of many paths' sums, magnitudes that cancelled; of float16, its subnormal numbers.
    const double allowed = relative * std::fabs(expected[i]) + 1e-6;
    if (std::fabs(value - expected[i]) <= allowed) continue;
    std::fprintf(stderr, "%s[%zu] must be %.9g, got %.9g\n", name, i, expected[i], value);
    problem.describe();
    return false;
  }
  return true;
}

bool run_problem(int index) {
  const Problem problem(false, 4, 200, 0, nullptr, {1});
  lb2_linear_args args = problem.layer_args();
  args.dtype = problem.dtype;
  const Expected expected = unpacked(problem);
  lb2::cuda::host::Runtime& gpu = lb2::cuda::host::runtime();
  std::vector<char> known;
  for (const lb2::cuda::Order order : {lb2::cuda::Order::kForward, lb2::cuda::Order::kShuffled}) {
    gpu.order = order;
    // Aligned to an element at least, as the caller's tensors are.
    const int64_t offset = index % 3 == 0 ? 0 : problem.element;
    std::vector<char> first_bytes(expected.first.size() * static_cast<size_t>(problem.element), 0x5A);
    std::vector<char> last_bytes(expected.last.size() * static_cast<size_t>(problem.element), 0x5A);
    Buffer first = copy_out(first_bytes, offset), last = copy_out(last_bytes, offset);
    gpu.launches.clear();
    int stream = 0;
    if (lb2_linear_unpack_cuda(&args, problem.single_stage ? nullptr : first.data, last.data, &stream) !=
        LB2_OK) {
      std::fprintf(stderr, "%s\n", lb2_last_error());
      return false;
    }
    EXPECT(gpu.launches.size() == 1 && gpu.launches[0].stream == &stream && !gpu.launches[0].chained);
    if (!close(problem, "first", first, expected.first) || !close(problem, "last", last, expected.last))
      return false;
    std::vector<char> result(first.data, first.data + first_bytes.size());
    result.insert(result.end(), last.data, last.data + last_bytes.size());
    if (known.empty()) known = result;
    EXPECT(result == known);
  }
  return true;
}

bool says(lb2_status got, lb2_status status, const char* part) {
  return got == status && std::strstr(lb2_last_error(), part) != nullptr;
}

void test_errors() {
  Setup setup(1, 64, 32, 8);
  setup.path.in_scale = setup.in_scale.data();
  setup.path.latent_scale = setup.latent_scale.data();
  setup.path.out_scale = setup.out_scale.data();
  std::vector<float> first(8 * 64), last(32 * 8), weight(32 * 64);
  lb2_linear_args args = setup.args;
  EXPECT(lb2_linear_unpack_cuda(&args, first.data(), last.data(), nullptr) == LB2_OK);
  EXPECT(says(lb2_linear_unpack_cuda(nullptr, first.data(), last.data(), nullptr), LB2_ERROR_INVALID_ARGUMENT,
              "args must not be NULL"));
  EXPECT(says(lb2_linear_unpack_cuda(&args, nullptr, last.data(), nullptr), LB2_ERROR_INVALID_ARGUMENT,
              "first must not be NULL"));
  EXPECT(says(lb2_linear_unpack_cuda(&args, first.data(), nullptr, nullptr), LB2_ERROR_INVALID_ARGUMENT,
              "last must not be NULL"));
  EXPECT(says(lb2_linear_unpack_cuda(&args, reinterpret_cast<char*>(first.data()) + 2, last.data(), nullptr),
              LB2_ERROR_INVALID_ARGUMENT, "first must be aligned to 4 bytes"));
  args.dtype = LB2_INT8;
  EXPECT(says(lb2_linear_unpack_cuda(&args, first.data(), last.data(), nullptr), LB2_ERROR_INVALID_ARGUMENT,
              "dtype must be"));
  args.dtype = LB2_FLOAT32;
  lb2_path path = setup.path;
  std::vector<int32_t> words(32 * 2);
  path.v = words.data();
  path.u = nullptr;
  path.latent_scale = nullptr;
  path.rank = 32;
  args.paths = &path;
  EXPECT(says(lb2_linear_unpack_cuda(&args, first.data(), weight.data(), nullptr), LB2_ERROR_INVALID_ARGUMENT,
              "first must be NULL"));
  EXPECT(lb2_linear_unpack_cuda(&args, nullptr, weight.data(), nullptr) == LB2_OK);
  lb2::cuda::host::runtime().error = cudaErrorNoKernelImageForDevice;
  EXPECT(says(lb2_linear_unpack_cuda(&args, nullptr, weight.data(), nullptr), LB2_ERROR_UNSUPPORTED,
              "has no code for this GPU's architecture"));
  lb2::cuda::host::runtime().error = cudaSuccess;
}

}  // namespace

int main() {
  constexpr int kProblems = 120;
  for (int index = 0; index < kProblems; ++index)
    if (!run_problem(index)) return EXIT_FAILURE;
  test_errors();
  if (failures > 0) return EXIT_FAILURE;
  std::printf("passed\n");
  return EXIT_SUCCESS;
}
