// Tensor-core rates: MMAs per SM and clock of the forms that the decode kernels use, and of int8 beside them.
// The first thing to know of a GPU: whether 1-bit MMAs are as fast as their bits promise, or emulated.
#include "cuda/device.h"
#include "cuda/timing.h"

namespace {

using namespace lb2::cuda;

constexpr int kChains = 8;  // independent accumulators of a warp
constexpr int kRounds = 2000;
constexpr int kBlockThreads = 256;
constexpr int kBlocksPerSm = 2;

LB2_DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

struct OneBit {
  using Sum = int32_t;
  static constexpr const char* kName = "m16n8k256.b1.and.popc";
  static constexpr int kDepth = 256;
  LB2_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_b1_and(c, a, b);
  }
};
struct Half {
  using Sum = float;
  static constexpr const char* kName = "m16n8k16.f16, fp32 sums";
  static constexpr int kDepth = 16;
  LB2_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(c, a, b);
  }
};
struct Byte {
  using Sum = int32_t;
  static constexpr const char* kName = "m16n8k32.s8";
  static constexpr int kDepth = 32;
  LB2_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_s8(c, a, b);
  }
};

template <typename Mma>
__global__ void multiply(typename Mma::Sum* sink) {
  typename Mma::Sum sums[kChains][4] = {};
  const uint32_t word = threadIdx.x;
  const uint32_t a[4] = {word, word, word, word}, b[2] = {word, word};
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) Mma::multiply(sums[chain], a, b);
  typename Mma::Sum total = 0;
  for (const auto& chain : sums)
    for (const auto sum : chain) total += sum;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

template <typename Mma>
void measure(FILE* json, bool last) {
  const int sms = lb2::bench::attribute(cudaDevAttrMultiProcessorCount), blocks = sms * kBlocksPerSm;
  void* sink = nullptr;
  LB2_CUDA(cudaMalloc(&sink, static_cast<size_t>(blocks) * kBlockThreads * 4));
  lb2::bench::Graph graph([&](cudaStream_t stream) {
    multiply<Mma><<<blocks, kBlockThreads, 0, stream>>>(static_cast<typename Mma::Sum*>(sink));
  });
  const double seconds = graph.median_seconds(9);
  LB2_CUDA(cudaFree(sink));
  const double each = static_cast<double>(kBlocksPerSm) * kBlockThreads / 32 * kRounds * kChains;
  const double rate = each / seconds;
  const double clock = lb2::bench::attribute(cudaDevAttrClockRate) * 1e3;
  std::printf("%-26s %7.1f M MMAs/s per SM, %5.3f per clock at %.2f GHz, %8.1f T multiply-adds/s in all\n",
              Mma::kName, rate / 1e6, rate / clock, clock / 1e9, rate * sms * 16 * 8 * Mma::kDepth / 1e12);
  std::fprintf(json, "    {\"mma\": \"%s\", \"per_sm_per_second\": %.6g, \"clock_hz\": %.6g}%s\n", Mma::kName,
               rate, clock, last ? "" : ",");
}

}  // namespace

int main(int argc, char** argv) {  // [FILE]: JSON
  FILE* json = lb2::bench::open_json(argc, argv);
  std::fprintf(json, "{\n  \"rates\": [\n");
  measure<OneBit>(json, false);
  measure<Half>(json, false);
  measure<Byte>(json, true);
  std::fprintf(json, "  ]\n}\n");
  return std::fclose(json) == 0 ? 0 : 2;
}
