// Random layers and activations with their double reference, in buffers of exactly the right size (so that
// sanitizers see every stray access) at odd addresses and with strides.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "littlebit2/littlebit2.h"

// Of all machines, the one that all others are compared with first.
constexpr lb2_isa kIsas[] = {LB2_ISA_SCALAR,      LB2_ISA_AVX2, LB2_ISA_AVX512,
                             LB2_ISA_AVX512_VNNI, LB2_ISA_NEON, LB2_ISA_AMX};

// The modes of the CPU. Tiles alone have the last one.
constexpr lb2_activation kCpuModes[] = {LB2_ACTIVATION_EXACT, LB2_ACTIVATION_INT16, LB2_ACTIVATION_INT8,
                                        LB2_ACTIVATION_SIGN, LB2_ACTIVATION_INT8X2};

inline bool serves(lb2_isa isa, lb2_activation activation) {
  return lb2_cpu_isa_available(isa) && (activation != LB2_ACTIVATION_INT8X2 || isa == LB2_ISA_AMX);
}

inline std::mt19937_64 engine;

// LB2_TEST_SAMPLE is set where a sample is enough: under sanitizers in `make test`. The sweeps run whole
// without sanitizers beside it, and under them in `make test-slow`.
inline bool sampled() {
  static const bool is_set = std::getenv("LB2_TEST_SAMPLE") != nullptr;
  return is_set;
}

// How many of `all` problems a run has.
inline int problem_count(int all) { return sampled() ? all / 3 : all; }

// FNV-1a of the results of the first instruction set in all problems. Problems draw integers alone and make
// exact floats of them, so that it is the same on every machine.
constexpr uint64_t kNoDigest = 0xCBF29CE484222325u;
inline uint64_t digest = kNoDigest;

inline void add_to_digest(const std::vector<char>& bytes) {
  for (const char byte : bytes) digest = (digest ^ static_cast<uint8_t>(byte)) * 0x100000001B3u;
}

// Calls run(index) for every problem, the same ones in every run, or others with a seed as the program's
// argument. Returns how many failed. A problem does not depend on what those before it drew: that depends on
// the instruction sets of the machine.
template <typename Run>
int run_problems(int argc, char** argv, int count, const Run& run) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  int failed = 0;
  for (int i = 0; i < count; ++i) {
    engine.seed(seed + 0x9E3779B97F4A7C15u * static_cast<uint64_t>(i));
    failed += !run(i);
  }
  std::printf("seed %llu, instruction sets", static_cast<unsigned long long>(seed));
  for (const lb2_isa isa : kIsas)
    if (lb2_cpu_isa_available(isa)) std::printf(" %s", lb2_isa_name(isa));
  std::printf("\n");
#if !defined(LB2_EMULATE_AMX)  // other machines have no such program to compare with
  if (digest != kNoDigest)
    std::printf("digest %016llx of %d problems\n", static_cast<unsigned long long>(digest), count);
#endif
  return failed;
}

// Whether a call succeeds with `args`, and refuses with an error that holds `part` what `change` makes of
// them.
template <typename Args>
bool refuses(lb2_status (*call)(const Args*), Args args, const char* part, void (*change)(Args*)) {
  if (call(&args) != LB2_OK) {
    std::fprintf(stderr, "%s\n", lb2_last_error());
    return false;
  }
  change(&args);
  if (call(&args) == LB2_ERROR_INVALID_ARGUMENT && std::strstr(lb2_last_error(), part) != nullptr)
    return true;
  std::fprintf(stderr, "expected an error with '%s', got '%s'\n", part, lb2_last_error());
  return false;
}

inline int64_t pick(std::initializer_list<int64_t> values) {
  return values.begin()[engine() % values.size()];
}

// `bytes` at an address that is odd when `misaligned` is set, ending exactly at the end of the allocation.
struct Buffer {
  std::unique_ptr<char[]> memory;
  char* data;
  Buffer(int64_t bytes, int64_t offset) : memory(new char[static_cast<size_t>(bytes + offset)]) {
    data = memory.get() + offset;
  }
};

template <typename T>
Buffer copy_out(const std::vector<T>& values, int64_t offset) {
  Buffer buffer(static_cast<int64_t>(values.size() * sizeof(T)), offset);
  if (!values.empty()) std::memcpy(buffer.data, values.data(), values.size() * sizeof(T));
  return buffer;
}

inline int64_t element_bytes(lb2_dtype dtype) { return dtype == LB2_FLOAT32 ? 4 : 2; }

inline double decode(lb2_dtype dtype, const char* element) {
  uint32_t bits = 0;
  if (dtype == LB2_FLOAT16) {
    std::memcpy(&bits, element, 2);
    const int exponent = static_cast<int>(bits >> 10 & 31u);
    const double mantissa = bits & 1023u;
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024.0 + mantissa, exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
  }
  // bfloat16 is the upper half of a float.
  std::memcpy(reinterpret_cast<char*>(&bits) + 4 - element_bytes(dtype), element,
              static_cast<size_t>(element_bytes(dtype)));
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A sum of four uniform numbers, about normal, of deviation 1.15: exact, as that of the C++ library is not.
inline float random_float() {
  const uint64_t bits = engine();
  int32_t sum = -2 * 0xFFFF;
  for (int part = 0; part < 64; part += 16) sum += static_cast<int32_t>(bits >> part & 0xFFFFu);
  return static_cast<float>(sum) * 0x1p-15f;
}

// A random element of moderate size, for every dtype of full precision.
inline void random_element(lb2_dtype dtype, char* element) {
  if (dtype == LB2_FLOAT16) {
    const uint16_t bits = static_cast<uint16_t>((engine() & 0x83FFu) | (9 + engine() % 6) << 10);
    std::memcpy(element, &bits, 2);
    return;
  }
  const float value = random_float();
  std::memcpy(element, reinterpret_cast<const char*>(&value) + 4 - element_bytes(dtype),
              static_cast<size_t>(element_bytes(dtype)));
}

inline double tolerance(lb2_dtype dtype) {
  const double rounding = dtype == LB2_FLOAT32 ? 0.0 : std::ldexp(1.0, dtype == LB2_FLOAT16 ? -11 : -8);
  return rounding + 2e-6;
}

// Uneven chunks on two threads.
inline int32_t parallel_for(void*, int64_t n, int64_t grain, lb2_task task, void* context) {
  const int64_t middle = std::min(n, std::max(grain, n / 3));
  std::thread other([=] { task(0, middle, context); });
  if (middle < n) task(middle, n, context);
  other.join();
  return 0;
}

struct Path {
  int64_t rank;
  std::vector<double> v, u;  // dense signs
  std::vector<float> in_scale, latent_scale, out_scale;
  std::vector<Buffer> buffers;
};

inline std::vector<float> random_floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = random_float();
  return values;
}

// Random signs with `pitch` words per row, the spare words and pad bits included, filled at random: kernels
// may not depend on them.
inline Buffer random_words(int64_t rows, int64_t cols, int64_t pitch, int64_t offset,
                           std::vector<double>& dense) {
  std::vector<int32_t> words(static_cast<size_t>((rows - 1) * pitch + lb2_words_per_row(cols)));
  for (int32_t& word : words) word = static_cast<int32_t>(engine());
  dense.resize(static_cast<size_t>(rows * cols));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      dense[r * cols + c] = (static_cast<uint32_t>(words[r * pitch + c / 32]) >> (c % 32)) & 1u ? -1.0 : 1.0;
  return copy_out(words, offset);
}

inline double sum_of_squares(const std::vector<float>& values) {
  double sum = 0.0;
  for (const float value : values) sum += static_cast<double>(value) * value;
  return sum;
}

// y[n] += out * (U @ (latent * (V @ (in * x)))), or its transpose. Returns the mean of |y|^2 over random
// signs: a result of few elements may cancel to almost nothing, and its error is then compared with that.
inline double reference(const std::vector<Path>& paths, bool single_stage, bool backward, int64_t k,
                        int64_t n, const double* input, double* output) {
  double typical = 0.0;
  for (const Path& path : paths) {
    const int64_t rank = path.rank;
    std::vector<double> latent(static_cast<size_t>(rank), 0.0);
    const std::vector<float>& first = backward ? path.out_scale : path.in_scale;
    double energy = 0.0;
    for (int64_t i = 0; i < (backward ? n : k); ++i) energy += std::pow(input[i] * first[i], 2);
    typical += energy * sum_of_squares(backward ? path.in_scale : path.out_scale) *
               (single_stage ? 1.0 : sum_of_squares(path.latent_scale));
    if (!backward) {
      for (int64_t r = 0; r < rank; ++r) {
        for (int64_t c = 0; c < k; ++c) latent[r] += path.v[r * k + c] * input[c] * path.in_scale[c];
        if (!single_stage) latent[r] *= path.latent_scale[r];
      }
      for (int64_t i = 0; i < n; ++i) {
        double sum = single_stage ? latent[i] : 0.0;
        if (!single_stage)
          for (int64_t r = 0; r < rank; ++r) sum += path.u[i * rank + r] * latent[r];
        output[i] += sum * path.out_scale[i];
      }
    } else {
      for (int64_t r = 0; r < rank; ++r) {
        if (single_stage) {
          latent[r] = input[r] * path.out_scale[r];
        } else {
          for (int64_t i = 0; i < n; ++i) latent[r] += path.u[i * rank + r] * input[i] * path.out_scale[i];
          latent[r] *= path.latent_scale[r];
        }
      }
      for (int64_t c = 0; c < k; ++c) {
        double sum = 0.0;
        for (int64_t r = 0; r < rank; ++r) sum += path.v[r * k + c] * latent[r];
        output[c] += sum * path.in_scale[c];
      }
    }
  }
  return typical;
}

// A layer, activations for it, and what it should return.
struct Problem {
  bool single_stage, backward, with_bias;
  int64_t misaligned;  // bytes that buffers are off
  lb2_dtype dtype;
  int64_t m, k, n, num_paths, in_cols, out_cols, element;
  std::vector<Path> paths;
  std::vector<lb2_path> args_paths;
  int64_t input_stride, output_stride;
  Buffer input{0, 0}, bias{0, 0};
  std::vector<double> expected;  // [m, out_cols]
  double typical = 0.0;

  // Ranks are at most 96, of some layers with one path or two up to `most_rank`; some layers have `wide`
  // columns. With `other`, a forward problem for the activations and stages of that one, with few paths.
  explicit Problem(bool may_be_backward, int64_t misalignment = 1, int64_t most_rank = 96, int64_t wide = 0,
                   const Problem* other = nullptr,
                   std::initializer_list<int64_t> tokens = {0, 1, 1, 2, 3, 6, 7, 12, 25, 110});
  const float* bias_data() const { return with_bias ? reinterpret_cast<const float*>(bias.data) : nullptr; }
  int64_t output_elements() const { return m == 0 ? 0 : (m - 1) * output_stride + out_cols; }
  lb2_linear_args layer_args() const {
    lb2_linear_args args = {};
    args.struct_size = sizeof args;
    args.k = k;
    args.n = n;
    args.paths = args_paths.data();
    args.num_paths = num_paths;
    return args;
  }

  // Relative error of an output, or infinity if anything was written between its rows.
  double error_of(const char* output) const {
    double error = 0.0, norm = 0.0;
    for (int64_t t = 0; t < m; ++t)
      for (int64_t i = 0; i < output_stride && t * output_stride + i < output_elements(); ++i) {
        const char* cell = output + (t * output_stride + i) * element;
        if (i >= out_cols) {
          for (int64_t b = 0; b < element; ++b)
            if (cell[b] != 0x5A) return INFINITY;
          continue;
        }
        const double truth = expected[t * out_cols + i], difference = decode(dtype, cell) - truth;
        error += difference * difference;
        norm += truth * truth;
      }
    norm = std::max(norm, typical);
    return norm > 0.0 ? std::sqrt(error / norm) : std::sqrt(error);
  }

  void describe() const {
    std::fprintf(stderr, "  dtype %d m %ld k %ld n %ld paths %ld%s%s\n", static_cast<int>(dtype),
                 static_cast<long>(m), static_cast<long>(k), static_cast<long>(n),
                 static_cast<long>(num_paths), single_stage ? ", single-stage" : "",
                 backward ? ", backward" : "");
  }
};

inline Problem::Problem(bool may_be_backward, int64_t misalignment, int64_t most_rank, int64_t wide,
                        const Problem* other, std::initializer_list<int64_t> tokens) {
  single_stage = engine() % 4 == 0;
  misaligned = engine() % 2 ? misalignment : 0;
  backward = may_be_backward && engine() % 2;
  const bool shared = engine() % 3 == 0, same_scale = engine() % 4 == 0;
  with_bias = engine() % 2;
  dtype = static_cast<lb2_dtype>(pick({LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16}));
  m = pick(tokens);
  k = pick({1, 5, 15, 31, 32, 33, 64, 100, 511, 721, 1025, 2100});
  n = pick({1, 2, 15, 16, 17, 63, 65, 130, 300});
  num_paths = pick({1, 1, 2, 2, 3, 5, LB2_MAX_PATHS});
  if (wide > 0 && num_paths <= 2 && engine() % 6 == 0) {
    k = wide;
    m = std::min<int64_t>(m, 12);
  }
  if (other != nullptr) {
    single_stage = other->single_stage;
    dtype = other->dtype;
    m = other->m;
    k = other->k;
    num_paths = std::min<int64_t>(num_paths, 2);
  }
  in_cols = backward ? n : k;
  out_cols = backward ? k : n;

  // Large ranks of few paths only: the reference takes its time.
  const uint64_t ranks = static_cast<uint64_t>(num_paths <= 2 && engine() % 4 == 0 ? most_rank : 96) / 8;
  paths.resize(static_cast<size_t>(num_paths));
  args_paths.resize(paths.size());
  for (size_t p = 0; p < paths.size(); ++p) {
    Path& path = paths[p];
    path.rank = single_stage
                    ? n
                    : (shared && p > 0 ? paths[0].rank : 8 * (1 + static_cast<int64_t>(engine() % ranks)));
    path.out_scale = random_floats(n);
    path.buffers.push_back(copy_out(path.out_scale, misaligned));
    lb2_path& args = args_paths[p];
    args = {};
    args.rank = path.rank;
    args.out_scale = reinterpret_cast<const float*>(path.buffers.back().data);
    if (shared && p > 0) {
      path.v = paths[0].v;
      path.in_scale = paths[0].in_scale;
      args.v = args_paths[0].v;
      args.v_stride = args_paths[0].v_stride;
      args.in_scale = args_paths[0].in_scale;
    } else {
      path.in_scale = same_scale && p > 0 ? paths[0].in_scale : random_floats(k);
      path.buffers.push_back(copy_out(path.in_scale, misaligned));
      args.in_scale = reinterpret_cast<const float*>(path.buffers.back().data);
      args.v_stride = lb2_words_per_row(k) + static_cast<int64_t>(engine() % 3);
      path.buffers.push_back(random_words(path.rank, k, args.v_stride, misaligned, path.v));
      args.v = reinterpret_cast<const int32_t*>(path.buffers.back().data);
    }
    if (single_stage) continue;
    path.latent_scale = random_floats(path.rank);
    path.buffers.push_back(copy_out(path.latent_scale, misaligned));
    args.latent_scale = reinterpret_cast<const float*>(path.buffers.back().data);
    args.u_stride = lb2_words_per_row(path.rank) + static_cast<int64_t>(engine() % 3);
    path.buffers.push_back(random_words(n, path.rank, args.u_stride, misaligned, path.u));
    args.u = reinterpret_cast<const int32_t*>(path.buffers.back().data);
  }

  element = element_bytes(dtype);
  // Stride 0 is one token, m times.
  input_stride = engine() % 8 == 0 ? 0 : in_cols + static_cast<int64_t>(engine() % 5);
  if (other != nullptr) input_stride = other->input_stride;
  output_stride = out_cols + static_cast<int64_t>(engine() % 5);
  const int64_t input_elements = m == 0 ? 0 : (m - 1) * input_stride + in_cols;
  input = Buffer(input_elements * element, misaligned);
  for (int64_t i = 0; i < input_elements; ++i) random_element(dtype, input.data + i * element);
  if (other != nullptr)
    std::memcpy(input.data, other->input.data, static_cast<size_t>(input_elements * element));
  const std::vector<float> bias_values = random_floats(n);
  bias = copy_out(bias_values, misaligned);

  expected.assign(static_cast<size_t>(m * out_cols), 0.0);
  for (int64_t t = 0; t < m; ++t) {
    std::vector<double> row(static_cast<size_t>(in_cols));
    for (int64_t i = 0; i < in_cols; ++i)
      row[i] = decode(dtype, input.data + (t * input_stride + i) * element);
    typical += reference(paths, single_stage, backward, k, n, row.data(), &expected[t * out_cols]);
    if (with_bias && !backward)
      for (int64_t i = 0; i < n; ++i) expected[t * n + i] += bias_values[i];
  }
}
