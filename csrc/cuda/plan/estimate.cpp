#include "cuda/plan/estimate.h"

#include <algorithm>
#include <cmath>

#include "cuda/gemm/sizes.h"
#include "cuda/plan/fused.h"

namespace lb2::cuda {
namespace {

// Cycles. Leads from data sheets and counts, to be replaced by measurements; only their order matters here.
constexpr double kStart = 1800;        // from the end of a kernel to the start of the next one
constexpr double kChainedStart = 540;  // the same of one that was chained to it
constexpr double kProduct = 2500;      // of a library's product beside its sums, as of a block of the GEMM
constexpr double kUnpack = 1000;       // of unpacking beside its bytes

// Of an SM in a cycle: bytes from memory, and multiply-adds of float16 into fp32 that a library reaches,
// seven tenths of the nominal rate.
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

// Of the launches of a GEMM.
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
    // Of a full round; the last one may not be.
    cycles += plan.launches[2 * s + 1].estimated_cycles * m / block;
  }
  return cycles;
}

// Of the one launch for both stages, which reads x, if the cache has it the second time, once.
double fused_cycles(const Stages& stages, double m, double element_bytes, const Rates& rates,
                    const Plan& plan) {
  const double block = static_cast<double>(plan.token_block), rounds = std::ceil(m / block);
  const double start = plan.launches[0].chained ? kChainedStart : kStart;
  double moved = static_cast<double>(stages.work[0].cols[0]);
  for (int g = 0; g < stages.work[1].num_groups; ++g) moved += static_cast<double>(stages.work[1].rows[g]);
  return kStart + rounds * start +
         std::max(plan.launches[0].estimated_cycles * m / block, m * moved * element_bytes / rates.bytes);
}

// Of unpacking and a library's products.
double unpack_cycles(const Stages& stages, double m, double element_bytes, const Rates& rates) {
  // As lb2_linear_unpack_cuda lays layers out: first stages are not shared, and the paths of a single stage
  // are one matrix.
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
  const double element_bytes = dtype == LB2_FLOAT32 ? 4 : 2;
  plan->estimated_cycles = to_cycles(is_fused(*plan) ? fused_cycles(stages, m, element_bytes, rates, *plan)
                                                     : gemm_cycles(stages, m, element_bytes, rates, *plan));
  // In float32 a library's rate depends on what it may round.
  if (dtype != LB2_FLOAT32) plan->unpack_cycles = to_cycles(unpack_cycles(stages, m, element_bytes, rates));
}

}  // namespace lb2::cuda
