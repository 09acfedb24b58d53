// Errors of the CUDA runtime as a status of the C ABI.
#pragma once

#include <cuda_runtime.h>

#include "core/status.h"

namespace lb2::cuda {

// `what` says what was being done. Defined in launch.cu.
lb2_status cuda_failure(const char* what, cudaError_t error) noexcept;

}  // namespace lb2::cuda

#define LB2_RETURN_IF_CUDA_ERROR(what, call)                                           \
  do {                                                                                 \
    const cudaError_t lb2_error_ = (call);                                             \
    if (lb2_error_ != cudaSuccess) return ::lb2::cuda::cuda_failure(what, lb2_error_); \
  } while (false)
