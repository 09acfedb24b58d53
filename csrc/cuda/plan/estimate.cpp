#include "cuda/plan/estimate.h"

#include <algorithm>
#include <cmath>

#include "cuda/gemm/sizes.h"
#include "cuda/plan/fused.h"
#include "cuda/plan/gemm.h"

namespace lb2::cuda {
namespace {

// In cycles. From data sheets and instruction counts, to be replaced by measurements; only the order of
// estimates matters here.
constexpr double kStart = 1800;                // from the end of a kernel to the start of the next one
constexpr double kChainedStart = 540;          // the same for a chained kernel
constexpr double kProduct = kGemmBlockCycles;  // of a library's product, besides its sums
constexpr double kUnpack = 1000;               // of dequantizing, besides its bytes

// Per SM and cycle: bytes from memory, and float16 multiply-adds into fp32. Libraries are modeled at 70 % of
// the nominal rate.
struct Rates {
  double bytes, macs;
};
Rates rates_of(int32_t capability) {
  if (capability >= 120) return {4, 179};
  if (capability >= 100) return {26, 2867};
  if (capability >= 90) return {16, 1433};
  if (capability >= 89) return {3, 179};
  if (capability >= 86) return {6, 179};
  return {12, 717};
}

int64_t to_cycles(double cycles) { return static_cast<int64_t>(std::min(cycles, 1e18)); }

// The launches of a GEMM.
double gemm_cycles(const Stages& stages, double m, double element_bytes, const Rates& rates,
                   const Plan& plan) {
  const double block = static_cast<double>(plan.token_block), rounds = std::ceil(m / block);
  const double start = plan.launches[1].chained ? kChainedStart : kStart;
  double cycles = kStart + rounds * 2 * stages.count * start;
  for (int s = 0; s < stages.count; ++s) {
    const Work& work = stages.work[s];
    double read = 0;
    for (int i = 0; i < work.num_terms; ++i)
      read += static_cast<double>(work.cols[i]) *
              (s == 0 ? element_bytes : 4 * static_cast<double>(plan.sum_parts));
    const double written =
        static_cast<double>(work.all_slices()) * gemm_block_bytes(plan.activation) / kGroupTokens;
    cycles += m * (read + written) / rates.bytes;
    // Estimated for full rounds; the last one may have fewer tokens.
    cycles += plan.launches[2 * s + 1].estimated_cycles * m / block;
  }
  return cycles;
}

// The fused launch. It reads x from memory once, if the second read hits the cache.
double fused_cycles(const Stages& stages, double m, double element_bytes, const Rates& rates,
                    const Plan& plan) {
  const double block = static_cast<double>(plan.token_block), rounds = std::ceil(m / block);
  const double start = plan.launches[0].chained ? kChainedStart : kStart;
  double moved = static_cast<double>(stages.work[0].cols[0]);
  for (int g = 0; g < stages.work[1].num_groups; ++g) moved += static_cast<double>(stages.work[1].rows[g]);
  return kStart + rounds * start +
         std::max(plan.launches[0].estimated_cycles * m / block, m * moved * element_bytes / rates.bytes);
}

// Dequantizing and a library's products. Host time is ignored.
double unpack_cycles(const Stages& stages, double m, double element_bytes, const Rates& rates) {
  // Like lb2_linear_unpack_cuda: first stages are not shared, and the paths of a single stage are one matrix.
  const Work& last = stages.work[stages.count - 1];
  const double k = static_cast<double>(stages.work[0].cols[0]);
  double elements = 0, moved = 0;
  for (int g = 0; g < last.num_groups; ++g) {
    const double n = static_cast<double>(last.rows[g]);
    moved += m * (k + n);
    if (stages.count == 1) elements += n * k;
    for (int i = last.first_term[g]; stages.count == 2 && i < last.first_term[g + 1]; ++i)
      elements += static_cast<double>(last.cols[i]) * (k + n);
  }
  return last.num_groups * (kStart + kUnpack + stages.count * (kStart + kProduct)) +
         elements * element_bytes / rates.bytes +
         std::max(m * elements / rates.macs, (elements + moved) * element_bytes / rates.bytes);
}

}  // namespace

void estimate_call(const Stages& stages, int64_t tokens, lb2_dtype dtype, Plan* plan) noexcept {
  const double sms = plan->device.multiprocessors, m = static_cast<double>(tokens);
  const Rates rates = {rates_of(plan->device.capability).bytes * sms,
                       rates_of(plan->device.capability).macs * sms};
  const double element_bytes = static_cast<double>(lb2::element_bytes(dtype));
  plan->estimated_cycles = to_cycles(is_fused(*plan) ? fused_cycles(stages, m, element_bytes, rates, *plan)
                                                     : gemm_cycles(stages, m, element_bytes, rates, *plan));
  // In float32 the rate of a library depends on whether it may use TF32.
  if (dtype != LB2_FLOAT32) plan->unpack_cycles = to_cycles(unpack_cycles(stages, m, element_bytes, rates));
}

}  // namespace lb2::cuda
