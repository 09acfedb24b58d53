#include "cuda/int8/check.h"

#include <cinttypes>

#include "core/check.h"
#include "core/shape.h"
#include "core/status.h"
#include "cuda/plan/check.h"

namespace lb2::cuda {

lb2_status check_int8_call(const lb2_int8_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_int8(args));
  LB2_RETURN_IF_ERROR(check_int8_buffers(*args, 0));
  // Kernels count rows, columns and tokens in 32 bits.
  constexpr int64_t kMost = INT32_MAX / 4;
  if (args->m > kMost || args->k > kMost || args->n > kMost)
    return fail(LB2_ERROR_UNSUPPORTED,
                "m, k and n must be at most %" PRId64 " on CUDA, got %" PRId64 ", %" PRId64 " and %" PRId64,
                kMost, args->m, args->k, args->n);
  const uintptr_t bytes = static_cast<uintptr_t>(element_bytes(args->dtype));
  LB2_RETURN_IF_ERROR(check_address("input", -1, args->input, bytes));
  LB2_RETURN_IF_ERROR(check_address("output", -1, args->output, bytes));
  LB2_RETURN_IF_ERROR(check_address("scale", -1, args->scale, 4));
  return check_address("bias", -1, args->bias, 4);
}

}  // namespace lb2::cuda
