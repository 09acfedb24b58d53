// The entry point of dense int8 rows.
#include "cuda/int8/int8.h"

#include "cuda/failure.h"
#include "cuda/int8/check.h"

namespace lb2::cuda {
namespace {

template <int kTokens>
lb2_status queue(const lb2_int8_args& args, cudaStream_t stream) {
  const int64_t steps = divide_up(args.k, kInt8Step);
  constexpr int64_t kStepBytes = kTokens * kInt8Step * 4;
  static_assert(kStepBytes <= kInt8ChunkBytes);
  const int64_t room = kInt8ChunkBytes / kStepBytes;
  Int8Params params = {};
  params.weight = args.weight;
  params.scale = args.scale;
  params.bias = args.bias;
  params.weight_stride = args.weight_stride;
  params.input_stride = args.input_stride;
  params.output_stride = args.output_stride;
  params.k = static_cast<int32_t>(args.k);
  params.n = static_cast<int32_t>(args.n);
  params.dtype = args.dtype;
  params.chunk_steps = static_cast<int32_t>(steps < room ? steps : room);
  constexpr int64_t kFreeBytes = 48 * 1024;  // that a kernel may use without being allowed to
  if (params.chunk_steps * kStepBytes > kFreeBytes)
    LB2_RETURN_IF_CUDA_ERROR(
        "preparing a kernel",
        cudaFuncSetAttribute(reinterpret_cast<const void*>(int8_rows<kTokens>),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, kInt8ChunkBytes));
  constexpr int64_t kMostTiles = 65535;  // blocks of a grid in y
  const int64_t round = kMostTiles * kTokens, bytes = args.dtype == LB2_FLOAT32 ? 4 : 2;
  for (int64_t first = 0; first < args.m; first += round) {
    const int64_t tokens = args.m - first < round ? args.m - first : round;
    params.m = static_cast<int32_t>(tokens);
    params.input = static_cast<const char*>(args.input) + first * args.input_stride * bytes;
    params.output = static_cast<char*>(args.output) + first * args.output_stride * bytes;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<int32_t>(divide_up(args.n, kInt8Rows)),
                          static_cast<int32_t>(divide_up(tokens, kTokens)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(params.chunk_steps * kStepBytes);
    config.stream = stream;
    LB2_RETURN_IF_CUDA_ERROR("launching a kernel", cudaLaunchKernelEx(&config, int8_rows<kTokens>, params));
  }
  return LB2_OK;
}

}  // namespace
}  // namespace lb2::cuda

lb2_status lb2_int8_forward_cuda(const lb2_int8_args* args, void* stream) {
  using namespace lb2::cuda;
  LB2_RETURN_IF_ERROR(check_int8_call(args));
  const cudaStream_t queue_of = static_cast<cudaStream_t>(stream);
  if (args->m <= 1) return queue<1>(*args, queue_of);
  if (args->m <= 2) return queue<2>(*args, queue_of);
  if (args->m <= 4) return queue<4>(*args, queue_of);
  if (args->m <= 8) return queue<8>(*args, queue_of);
  return queue<16>(*args, queue_of);
}
