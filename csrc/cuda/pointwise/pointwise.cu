#include "cuda/pointwise/pointwise.h"

#include <cinttypes>

#include "cuda/pointwise/launch.h"

namespace lb2::cuda {
namespace {

template <typename Params>
lb2_status queue(void (*kernel)(const Params), int64_t blocks, int shared_bytes, const Params& params,
                 cudaStream_t stream) {
  if (blocks > INT32_MAX)
    return fail(LB2_ERROR_UNSUPPORTED,
                "m tokens of n columns must be at most %d blocks of %d elements where the call has a norm, a "
                "function or a residual, got %" PRId64,
                INT32_MAX, kPointwiseCols, blocks);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<int32_t>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  LB2_RETURN_IF_CUDA_ERROR("launching a kernel", cudaLaunchKernelEx(&config, kernel, params));
  return LB2_OK;
}

}  // namespace

lb2_status queue_normalize(const lb2_norm& norm, const void* input, int64_t input_stride, lb2_dtype dtype,
                           int64_t m, int64_t cols, float* output, cudaStream_t stream) noexcept {
  const NormalizeParams params = {input, input_stride, dtype, static_cast<int32_t>(cols), norm, output};
  return queue(normalize, m, kWarps * 4, params, stream);
}

lb2_status queue_pointwise(const Pointwise& call, int64_t m, int64_t cols, lb2_dtype dtype,
                           cudaStream_t stream) noexcept {
  PointwiseParams params = {};
  params.data = call.data;
  params.stride = call.stride;
  params.function = call.function;
  params.factor = call.factor;
  params.factor_stride = call.factor_stride;
  params.addend = call.addend;
  params.addend_stride = call.addend_stride;
  params.dtype = dtype;
  params.cols = static_cast<int32_t>(cols);
  params.row_blocks = static_cast<int32_t>(divide_up(cols, kPointwiseCols));
  return queue(pointwise, m * params.row_blocks, 0, params, stream);
}

}  // namespace lb2::cuda
