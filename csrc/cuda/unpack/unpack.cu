// The entry point that dequantizes a layer for matrix products of a library.
#include "cuda/unpack/unpack.h"

#include <cinttypes>

#include "cuda/failure.h"
#include "cuda/plan/check.h"
#include "cuda/plan/layers.h"

namespace lb2::cuda {
namespace {

class Matrices {
 public:
  explicit Matrices(lb2_dtype dtype) { params_.dtype = dtype; }

  // Starts a matrix at element `at` of `output`: the sum of the factors that are added next.
  void add_matrix(void* output, int64_t at, int64_t stride, int64_t rows, int64_t cols) {
    Unpacked& matrix = params_.matrices[params_.num_matrices++];
    matrix.output = static_cast<char*>(output) + at * element_bytes(params_.dtype);
    matrix.stride = stride;
    matrix.first_block = blocks_;
    matrix.rows = static_cast<int32_t>(rows);
    matrix.cols = static_cast<int32_t>(cols);
    matrix.first_factor = matrix.last_factor = params_.num_factors;
    blocks_ += divide_up(divide_up(rows, kUnpackRows) * divide_up(cols, kUnpackCols), kThreads);
  }
  void add_factor(const int32_t* words, int64_t word_stride, const float* row_scale, const float* col_scale) {
    params_.factors[params_.num_factors++] = {reinterpret_cast<const uint32_t*>(words), row_scale, col_scale,
                                              word_stride};
    params_.matrices[params_.num_matrices - 1].last_factor = params_.num_factors;
  }

  lb2_status queue(cudaStream_t stream) const {
    if (blocks_ > INT32_MAX)
      return fail(LB2_ERROR_UNSUPPORTED,
                  "the unpacked layer must be of at most %d blocks of %d elements, got %" PRId64, INT32_MAX,
                  kThreads * kUnpackRows * kUnpackCols, blocks_);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<int32_t>(blocks_));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    LB2_RETURN_IF_CUDA_ERROR("launching a kernel", cudaLaunchKernelEx(&config, unpack, params_));
    return LB2_OK;
  }

 private:
  UnpackParams params_ = {};
  int64_t blocks_ = 0;
};

lb2_status check_output(const char* name, const void* output, bool wanted, lb2_dtype dtype) {
  if ((output != nullptr) != wanted)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "%s must %sbe NULL", name, wanted ? "not " : "");
  const uintptr_t bytes = static_cast<uintptr_t>(element_bytes(dtype));
  if (reinterpret_cast<uintptr_t>(output) % bytes == 0) return LB2_OK;
  return fail(LB2_ERROR_INVALID_ARGUMENT, "%s must be aligned to %d bytes, got %p", name,
              static_cast<int>(bytes), output);
}

}  // namespace
}  // namespace lb2::cuda

lb2_status lb2_linear_unpack_cuda(const lb2_linear_args* args, void* first, void* last, void* stream) {
  using namespace lb2::cuda;
  Layers layers;
  LB2_RETURN_IF_ERROR(gather_layers(args, 1, &layers));
  lb2_linear_args layer = *args;
  layer.input = layer.bias = nullptr;
  layer.output = nullptr;
  LB2_RETURN_IF_ERROR(check_addresses(layer));
  LB2_RETURN_IF_ERROR(check_output("first", first, !layers.shape.single_stage, args->dtype));
  LB2_RETURN_IF_ERROR(check_output("last", last, true, args->dtype));
  Matrices matrices(args->dtype);
  if (layers.shape.single_stage) {
    matrices.add_matrix(last, 0, args->k, args->n, args->k);
    for (int p = 0; p < layers.shape.num_paths; ++p) {
      const lb2_path& path = *layers.paths[p];
      matrices.add_factor(path.v, path.v_stride, path.out_scale, path.in_scale);
    }
    return matrices.queue(static_cast<cudaStream_t>(stream));
  }
  int64_t latents = 0;
  for (int p = 0; p < layers.shape.num_paths; ++p) latents += layers.paths[p]->rank;
  int64_t before = 0;
  for (int p = 0; p < layers.shape.num_paths; ++p) {
    const lb2_path& path = *layers.paths[p];
    matrices.add_matrix(first, before * args->k, args->k, path.rank, args->k);
    matrices.add_factor(path.v, path.v_stride, nullptr, path.in_scale);
    matrices.add_matrix(last, before, latents, args->n, path.rank);
    matrices.add_factor(path.u, path.u_stride, path.out_scale, path.latent_scale);
    before += path.rank;
  }
  return matrices.queue(static_cast<cudaStream_t>(stream));
}
