#include "torch/dense/unpack.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "torch/dense/factors.h"

namespace lb2::torch_ops {
namespace {

// Of each byte the sign bits of eight floats: loops of eight without branches become vector instructions.
struct ByteSigns {
  uint32_t bits[256][8];
  constexpr ByteSigns() : bits() {
    for (uint32_t byte = 0; byte < 256; ++byte)
      for (uint32_t i = 0; i < 8; ++i) bits[byte][i] = (byte >> i & 1u) << 31;
  }
};
constexpr ByteSigns kByteSigns;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// row_scale * signs * col_scale of one row, added to `sums`.
void add_row(const int32_t* words, int64_t cols, float row_scale, const float* col_scale, float* sums) {
  int64_t col = 0;
  for (; col + 8 <= cols; col += 8) {
    const uint32_t word = static_cast<uint32_t>(words[col / LB2_WORD_BITS]);
    const uint32_t* signs = kByteSigns.bits[word >> col % LB2_WORD_BITS & 255u];
    for (int i = 0; i < 8; ++i) sums[col + i] += float_of(bits_of(row_scale * col_scale[col + i]) ^ signs[i]);
  }
  for (; col < cols; ++col) {
    const uint32_t word = static_cast<uint32_t>(words[col / LB2_WORD_BITS]);
    const float product = row_scale * col_scale[col];
    sums[col] += word >> col % LB2_WORD_BITS & 1u ? -product : product;
  }
}

template <typename T>
void store_row(const float* sums, int64_t cols, char* row) {
  for (int64_t col = 0; col < cols; ++col) {
    const T value = static_cast<T>(sums[col]);
    std::memcpy(row + col * static_cast<int64_t>(sizeof value), &value, sizeof value);
  }
}

// To nearest, ties to even, any NaN to one, as torch has it; without branches.
void store_bfloat_row(const float* sums, int64_t cols, char* row) {
  for (int64_t col = 0; col < cols; ++col) {
    const uint32_t bits = bits_of(sums[col]), rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    const uint16_t value = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
    std::memcpy(row + col * 2, &value, 2);
  }
}

void store_row(const float* sums, int64_t cols, lb2_dtype dtype, char* row) {
  if (dtype == LB2_FLOAT32) return store_row<float>(sums, cols, row);
  if (dtype == LB2_FLOAT16) return store_row<torch::headeronly::Half>(sums, cols, row);
  store_bfloat_row(sums, cols, row);
}

// Rows of `output`, `stride` elements apart, each the sum that add(row, sums) makes.
template <typename Add>
void fill(char* output, int64_t stride, int64_t rows, int64_t cols, lb2_dtype dtype, const Add& add) {
  struct Task {
    char* output;
    int64_t row_bytes, cols;
    lb2_dtype dtype;
    const Add* add;
  } task = {output, stride * element_bytes(dtype), cols, dtype, &add};
  const auto run = [](int64_t begin, int64_t end, void* context) {
    const Task& own = *static_cast<const Task*>(context);
    std::vector<float> sums(static_cast<size_t>(own.cols));
    for (int64_t row = begin; row < end; ++row) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      (*own.add)(row, sums.data());
      store_row(sums.data(), own.cols, own.dtype, own.output + row * own.row_bytes);
    }
  };
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(cols, 1));
  torch_parallel(nullptr, rows, grain, run, &task);
}

}  // namespace

std::vector<Tensor> unpack_cpu(const std::vector<Tensor>& v, const OptionalTensors& u,
                               const std::vector<Tensor>& in_scale, const OptionalTensors& latent_scale,
                               const std::vector<Tensor>& out_scale, int64_t dtype) {
  lb2_linear_args args = {};
  Paths paths;
  set_layer(args, paths.data(), all_paths(v, u, in_scale, latent_scale, out_scale), kCpu);
  std::vector<Tensor> factors = new_factors(args, in_scale[0], dtype);
  shape_of_layer(args);  // for its checks
  char* const last = static_cast<char*>(factors.back().mutable_data_ptr());
  if (args.paths[0].u == nullptr) {
    fill(last, args.k, args.n, args.k, args.dtype, [&](int64_t row, float* sums) {
      for (int64_t p = 0; p < args.num_paths; ++p) {
        const lb2_path& path = args.paths[p];
        add_row(path.v + row * path.v_stride, args.k, path.out_scale[row], path.in_scale, sums);
      }
    });
    return factors;
  }
  char* first = static_cast<char*>(factors[0].mutable_data_ptr());
  const int64_t bytes = element_bytes(args.dtype), latents = factors[0].size(0);
  int64_t before = 0;
  for (int64_t p = 0; p < args.num_paths; ++p) {
    const lb2_path& path = args.paths[p];
    fill(first + before * args.k * bytes, args.k, path.rank, args.k, args.dtype,
         [&](int64_t row, float* sums) {
           add_row(path.v + row * path.v_stride, args.k, 1.0f, path.in_scale, sums);
         });
    fill(last + before * bytes, latents, args.n, path.rank, args.dtype, [&](int64_t row, float* sums) {
      add_row(path.u + row * path.u_stride, path.rank, path.out_scale[row], path.latent_scale, sums);
    });
    before += path.rank;
  }
  return factors;
}

}  // namespace lb2::torch_ops
