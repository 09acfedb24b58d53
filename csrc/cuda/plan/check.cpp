#include "cuda/plan/check.h"

#include <algorithm>
#include <cinttypes>

#include "core/shape.h"
#include "core/status.h"
#include "cuda/decode/sizes.h"
#include "cuda/fused/params.h"
#include "cuda/gemm/sizes.h"

namespace lb2::cuda {
namespace {

constexpr int32_t kLeastCapability = 80;
constexpr int64_t kMostParts = 65535;  // blocks of a grid in y

// Kernels round rows and columns up to whole blocks and slices, and count the bytes of a float32 row in 32
// bits.
constexpr int64_t kMaxSize = INT32_MAX / 4 - 1023;
constexpr int64_t kMostSharedBytes = 1 << 24;  // per block; much more than any GPU has

}  // namespace

lb2_status check_address(const char* name, int64_t index, const void* p, uintptr_t bytes) noexcept {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return LB2_OK;
  if (index < 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "%s must be aligned to %d bytes, got %p", name,
                static_cast<int>(bytes), p);
  return fail(LB2_ERROR_INVALID_ARGUMENT, "paths[%" PRId64 "].%s must be aligned to %d bytes, got %p", index,
              name, static_cast<int>(bytes), p);
}

bool asks_for_gemm(const lb2_cuda_tuning& tuning) noexcept {
  const auto any = [](const int32_t (&of_stages)[2]) { return of_stages[0] != 0 || of_stages[1] != 0; };
  return tuning.splits != 0 || any(tuning.gemm_rows) || any(tuning.gemm_tokens);
}

lb2_status check_device(const lb2_cuda_device* device) noexcept {
  if (device == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "device must not be NULL");
  if (device->struct_size != sizeof(lb2_cuda_device))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "device->struct_size must equal sizeof(lb2_cuda_device) = %zu, got %" PRIu64,
                sizeof(lb2_cuda_device), device->struct_size);
  if (device->capability < kLeastCapability)
    return fail(LB2_ERROR_UNSUPPORTED,
                "the CUDA kernels need a GPU of compute capability 8.0 or newer, got %" PRId32 ".%" PRId32,
                device->capability / 10, device->capability % 10);
  if (device->multiprocessors < 1)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "device->multiprocessors must be >= 1, got %" PRId32,
                device->multiprocessors);
  // One slice of 16 tokens in the widest mode.
  const int64_t least = slice_bytes(LB2_ACTIVATION_EXACT, kMaxTokenTile) + sums_bytes(kMaxTokenTile);
  if (device->shared_bytes < least || device->shared_bytes > kMostSharedBytes)
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "device->shared_bytes must be between %" PRId64 " and %" PRId64 ", got %" PRId64, least,
                kMostSharedBytes, device->shared_bytes);
  return LB2_OK;
}

lb2_status check_tuning(const lb2_cuda_tuning& tuning, lb2_activation activation,
                        int64_t most_splits) noexcept {
  for (const int32_t warps : tuning.row_warps)
    if (warps < 0 || warps > kWarps || (warps & (warps - 1)) != 0)
      return fail(LB2_ERROR_INVALID_ARGUMENT, "tuning->row_warps must be 0, 1, 2, 4 or 8, got %" PRId32,
                  warps);
  if (tuning.splits < 0 || tuning.splits > std::min(most_splits, kMostParts))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "tuning->splits must be between 0 and %" PRId64 ", got %" PRId32,
                std::min(most_splits, kMostParts), tuning.splits);
  if (tuning.max_chunk < 0)
    return fail(LB2_ERROR_INVALID_ARGUMENT, "tuning->max_chunk must be >= 0, got %" PRId32, tuning.max_chunk);
  const bool power_of_two = (tuning.fused & (tuning.fused - 1)) == 0;
  if (tuning.fused < -1 || tuning.fused > kFusedMostBlocks || (tuning.fused > 0 && !power_of_two))
    return fail(LB2_ERROR_INVALID_ARGUMENT, "tuning->fused must be -1, 0, 1, 2, 4 or 8, got %" PRId32,
                tuning.fused);
  if (tuning.fused > 0 && asks_for_gemm(tuning))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "tuning->splits, gemm_rows and gemm_tokens must be 0 where fused, %" PRId32
                ", asks for one launch instead of those",
                tuning.fused);
  for (int stage = 0; stage < 2; ++stage) {
    const int32_t rows = tuning.gemm_rows[stage], tokens = tuning.gemm_tokens[stage];
    bool known = false;
    for (const GemmTile& tile : kGemmTiles)
      known = known || ((rows == 0 || rows == tile.rows) && (tokens == 0 || tokens == tile.tokens) &&
                        (!has_gemm(activation) || has_gemm_tile(activation, tile.rows, tile.tokens)));
    if (!known)
      return fail(LB2_ERROR_INVALID_ARGUMENT,
                  "tuning->gemm_rows and gemm_tokens must be 64 and 32, 128 and 32, 128 and 64 or, but in "
                  "exact, 128 and 128, each 0 for any, got %" PRId32 " and %" PRId32,
                  rows, tokens);
  }
  return LB2_OK;
}

lb2_status check_plan_struct(const lb2_cuda_plan* plan) noexcept {
  if (plan == nullptr) return fail(LB2_ERROR_INVALID_ARGUMENT, "plan must not be NULL");
  if (plan->struct_size != sizeof(lb2_cuda_plan))
    return fail(LB2_ERROR_INVALID_ARGUMENT,
                "plan->struct_size must equal sizeof(lb2_cuda_plan) = %zu, got %" PRIu64,
                sizeof(lb2_cuda_plan), plan->struct_size);
  return LB2_OK;
}

lb2_status check_sizes(const lb2_layer_shape& shape) noexcept {
  int64_t largest = std::max(shape.k, shape.n);
  for (int64_t p = 0; p < shape.num_paths; ++p) largest = std::max(largest, shape.ranks[p]);
  if (largest <= kMaxSize) return LB2_OK;
  return fail(LB2_ERROR_UNSUPPORTED, "k, n and every rank must be at most %" PRId64 " on CUDA, got %" PRId64,
              kMaxSize, largest);
}

lb2_status check_addresses(const lb2_linear_args& args) noexcept {
  const uintptr_t bytes = static_cast<uintptr_t>(element_bytes(args.dtype));
  LB2_RETURN_IF_ERROR(check_address("input", -1, args.input, bytes));
  LB2_RETURN_IF_ERROR(check_address("output", -1, args.output, bytes));
  LB2_RETURN_IF_ERROR(check_address("bias", -1, args.bias, 4));
  for (int64_t p = 0; p < args.num_paths; ++p) {
    const lb2_path& path = args.paths[p];
    LB2_RETURN_IF_ERROR(check_address("v", p, path.v, 4));
    LB2_RETURN_IF_ERROR(check_address("u", p, path.u, 4));
    LB2_RETURN_IF_ERROR(check_address("in_scale", p, path.in_scale, 4));
    LB2_RETURN_IF_ERROR(check_address("latent_scale", p, path.latent_scale, 4));
    LB2_RETURN_IF_ERROR(check_address("out_scale", p, path.out_scale, 4));
  }
  return LB2_OK;
}

}  // namespace lb2::cuda
