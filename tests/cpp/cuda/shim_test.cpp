// Tests of what executes CUDA kernels on the host (cuda_host): a kernel test proves as much as this emulation
// is worth. MMAs are compared with matrix products written down from the element formulas of the PTX ISA,
// sections "Matrix Fragments for mma.m16n8k256", "for mma.m16n8k16 with floating point type" and "for
// mma.m16n8k32"; what a GPU would hang on or leave undefined must end the process, which a forked child
// shows.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda_host/run_grid.h"

namespace {

using namespace lb2::cuda;

int failures = 0;
std::mt19937 engine(20250);

#define EXPECT(condition)                                                          \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                                  \
    }                                                                              \
  } while (false)

constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kShuffled};

// ---- MMAs: elements are numbered as in the documentation, low to high through the registers
// -----------------------

// One warp's MMA of a [16, depth], b [depth, 8] and c [16, 8] against the sum over its columns: load(group,
// in_group, ra, rb) fills the fragments of a and b as the PTX ISA says of the instruction; those of c are the
// same for all.
template <typename Value, typename Sum, typename Load, typename Mma, typename Product>
void check_mma(Order order, size_t depth, const std::vector<Value>& a, const std::vector<Value>& b,
               const std::vector<Sum>& c, const Load& load, const Mma& mma, const Product& product) {
  std::vector<Sum> out(16 * 8, Sum{0});
  run_grid(
      {1, 1, 1}, 32, 0,
      [&] {
        const int group = thread_id() >> 2, in_group = thread_id() % 4;
        const auto at = [&](int i) {
          return static_cast<size_t>((i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1));
        };
        uint32_t ra[4] = {}, rb[2] = {};
        Sum rc[4];
        load(group, in_group, ra, rb);
        for (int i = 0; i < 4; ++i) rc[i] = c[at(i)];
        mma(rc, ra, rb);
        for (int i = 0; i < 4; ++i) out[at(i)] = rc[i];
      },
      order);
  for (size_t m = 0; m < 16; ++m)
    for (size_t n = 0; n < 8; ++n) {
      Sum sum = c[m * 8 + n];
      for (size_t k = 0; k < depth; ++k) sum += product(a[m * depth + k], b[k * 8 + n]);
      EXPECT(out[m * 8 + n] == sum);
    }
}

void test_mma_b1() {
  for (const Order order : kOrders) {
    std::vector<int> a(16 * 256), b(256 * 8), c(16 * 8);
    for (int& bit : a) bit = static_cast<int>(engine() & 1);
    for (int& bit : b) bit = static_cast<int>(engine() & 1);
    for (int& value : c) value = static_cast<int>(engine() % 2001) - 1000;
    check_mma(
        order, 256, a, b, c,
        [&](int group, int in_group, uint32_t (&ra)[4], uint32_t (&rb)[2]) {
          for (int i = 0; i < 128; ++i) {
            const int row = i < 32 || (i >= 64 && i < 96) ? group : group + 8;
            const int col = in_group * 32 + (i & 31) + (i < 64 ? 0 : 128);
            ra[i / 32] |= static_cast<uint32_t>(a[static_cast<size_t>(row * 256 + col)]) << (i % 32);
          }
          for (int i = 0; i < 64; ++i) {
            const int row = in_group * 32 + (i & 31) + (i < 32 ? 0 : 128);
            rb[i / 32] |= static_cast<uint32_t>(b[static_cast<size_t>(row * 8 + group)]) << (i % 32);
          }
        },
        [](auto& rc, const auto& ra, const auto& rb) { mma_b1_and(rc, ra, rb); },
        [](int x, int y) { return x & y; });
  }
}

void test_mma_f16() {
  for (const Order order : kOrders) {
    // Integers up to 64: sums are exact in any order.
    std::vector<float> a(16 * 16), b(16 * 8), c(16 * 8);
    for (auto* matrix : {&a, &b, &c})
      for (float& value : *matrix) value = static_cast<float>(static_cast<int>(engine() % 129) - 64);
    check_mma(
        order, 16, a, b, c,
        [&](int group, int in_group, uint32_t (&ra)[4], uint32_t (&rb)[2]) {
          for (int i = 0; i < 8; ++i) {
            const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
            const int col = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
            ra[i / 2] |= static_cast<uint32_t>(float_to_half(a[static_cast<size_t>(row * 16 + col)]))
                         << (16 * (i % 2));
          }
          for (int i = 0; i < 4; ++i) {
            const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
            rb[i / 2] |= static_cast<uint32_t>(float_to_half(b[static_cast<size_t>(row * 8 + group)]))
                         << (16 * (i % 2));
          }
        },
        [](auto& rc, const auto& ra, const auto& rb) { mma_f16(rc, ra, rb); },
        [](float x, float y) { return x * y; });
  }
}

void test_mma_s8() {
  for (const Order order : kOrders) {
    std::vector<int> a(16 * 32), b(32 * 8), c(16 * 8);
    for (auto* matrix : {&a, &b})
      for (int& value : *matrix) value = static_cast<int>(engine() % 256) - 128;
    for (int& value : c) value = static_cast<int>(engine() % 2001) - 1000;
    check_mma(
        order, 32, a, b, c,
        [&](int group, int in_group, uint32_t (&ra)[4], uint32_t (&rb)[2]) {
          for (int i = 0; i < 16; ++i) {
            const int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
            const int col = in_group * 4 + (i & 3) + (i < 8 ? 0 : 16);
            ra[i / 4] |= (static_cast<uint32_t>(a[static_cast<size_t>(row * 32 + col)]) & 0xFFu)
                         << (8 * (i % 4));
          }
          for (int i = 0; i < 8; ++i) {
            const int row = in_group * 4 + (i & 3) + (i < 4 ? 0 : 16);
            rb[i / 4] |= (static_cast<uint32_t>(b[static_cast<size_t>(row * 8 + group)]) & 0xFFu)
                         << (8 * (i % 4));
          }
        },
        [](auto& rc, const auto& ra, const auto& rb) { mma_s8(rc, ra, rb); },
        [](int x, int y) { return x * y; });
  }
}

// ---- Warps and blocks
// ----------------------------------------------------------------------------------------------

void test_shuffle() {
  for (const Order order : kOrders)
    run_grid(
        {1, 1, 1}, 64, 0,
        [&] {
          const int thread = thread_id();
          for (int mask = 0; mask < 32; ++mask) {
            EXPECT(shuffle_xor(0.5f * static_cast<float>(thread), mask) ==
                   0.5f * static_cast<float>(thread ^ mask));
            EXPECT(shuffle_xor(~static_cast<uint32_t>(thread), mask) ==
                   ~static_cast<uint32_t>(thread ^ mask));
          }
        },
        order);
}

void test_reductions() {
  for (const Order order : kOrders)
    run_grid(
        {1, 1, 1}, 64, 0,
        [&] {
          const int warp = thread_id() / 32, lane = thread_id() % 32;
          EXPECT(warp_max(static_cast<uint32_t>(lane * 7 % 32) << warp) == 31u << warp);
          EXPECT(warp_sum(lane - 20 * warp) == 496 - 640 * warp);
          EXPECT(warp_sum(INT32_MAX) == -32);  // wraps
        },
        order);
}

// What a thread copies is there once it has waited, not before; other threads need a barrier as well.
void test_copies() {
  alignas(16) static uint32_t words[64 * 4];
  for (uint32_t i = 0; i < 256; ++i) words[i] = i;
  for (const Order order : kOrders)
    run_grid(
        {1, 1, 1}, 64, 64 * 16,
        [&] {
          const int thread = thread_id(), other = (thread + 17) % 64;
          copy_words4(shared_memory() + thread * 16, words + thread * 4);
          EXPECT(load_words4(shared_memory() + thread * 16).w[1] == 0xFFFFFFFFu);
          wait_for_copies();
          EXPECT(load_words4(shared_memory() + thread * 16).w[1] == static_cast<uint32_t>(thread * 4 + 1));
          sync_block();
          EXPECT(load_words4(shared_memory() + other * 16).w[3] == static_cast<uint32_t>(other * 4 + 3));
        },
        order);
}

// Groups arrive in the order of their commits, and no sooner than they must; what is not inside is zero.
void test_copy_groups() {
  alignas(16) static uint32_t words[32 * 4];
  for (uint32_t i = 0; i < 128; ++i) words[i] = i;
  for (const Order order : kOrders)
    run_grid(
        {1, 1, 1}, 32, 32 * 32,
        [&] {
          constexpr uint32_t kNothing = 0xFFFFFFFFu;
          const uint32_t thread = static_cast<uint32_t>(thread_id());
          uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory()) + thread * 8;
          copy_words4(shared, words + thread * 4);
          commit_copies();
          commit_copies();  // of nothing
          copy_word(shared + 4, words + thread, true);
          copy_word(shared + 5, nullptr, false);  // not read
          commit_copies();
          wait_for_copy_groups<3>();
          EXPECT(shared[1] == kNothing);
          wait_for_copy_groups<2>();
          EXPECT(shared[1] == thread * 4 + 1 && shared[4] == kNothing);
          copy_word(shared + 6, words + 2, true);
          wait_for_copy_groups<1>();
          EXPECT(shared[4] == kNothing);
          wait_for_copy_groups<0>();
          EXPECT(shared[4] == thread && shared[5] == 0 && shared[6] == kNothing);
          commit_copies();
          wait_for_copy_groups<0>();
          EXPECT(shared[6] == 2 && shared[7] == kNothing);
        },
        order);
}

// Every thread sees what all others wrote before the barrier; blocks have their own poisoned shared memory.
void test_barriers() {
  for (const Order order : kOrders) {
    std::vector<int> visits(2 * 3 * 4, 0);
    run_grid(
        {2, 3, 4}, 128, 128 * 4,
        [&] {
          unsigned char* shared = shared_memory();
          EXPECT(reinterpret_cast<uintptr_t>(shared) % 128 == 0);
          uint32_t* words = reinterpret_cast<uint32_t*>(shared);
          EXPECT(words[thread_id()] == 0xFFFFFFFFu);
          for (int round = 0; round < 5; ++round) {
            words[thread_id()] = static_cast<uint32_t>(1000 * round + thread_id());
            sync_block();
            for (int i = 0; i < 128; ++i) EXPECT(words[i] == static_cast<uint32_t>(1000 * round + i));
            sync_block();
          }
          if (thread_id() == 0) ++visits[static_cast<size_t>(block_x() + 2 * (block_y() + 3 * block_z()))];
        },
        order);
    for (const int count : visits) EXPECT(count == 1);
  }
}

// The blocks of a cluster see what all others wrote to their shared memory before its barrier, and where a
// block is in the grid is what it would be without clusters.
void test_clusters() {
  for (const Order order : kOrders)
    for (const int blocks : {1, 2, 4}) {
      std::vector<int> visits(2 * 4 * 3, 0);
      run_grid(
          {2, 4, 3}, 64, 64 * 4,
          [&] {
            uint32_t* words = reinterpret_cast<uint32_t*>(shared_memory());
            const int rank = block_y() % blocks;
            const auto word_of = [&](int other, int thread) {
              return *static_cast<const uint32_t*>(shared_of_block(words + thread, other));
            };
            EXPECT(shared_of_block(words, rank) == words);
            for (int round = 0; round < 3; ++round) {
              // Written by a neighbor.
              uint32_t* theirs =
                  static_cast<uint32_t*>(shared_of_block(words + thread_id(), (rank + 1) % blocks));
              *theirs = static_cast<uint32_t>(1000 * round + 100 * rank + thread_id());
              sync_cluster();
              for (int other = 0; other < blocks; ++other)
                for (int i = 0; i < 64; ++i)
                  EXPECT(word_of((other + 1) % blocks, i) ==
                         static_cast<uint32_t>(1000 * round + 100 * other + i));
              sync_cluster();
            }
            sync_warp();
            if (thread_id() == 0) ++visits[static_cast<size_t>(block_x() + 2 * (block_y() + 4 * block_z()))];
          },
          order, {}, false, 1, blocks);
      for (const int count : visits) EXPECT(count == 1);
    }
}

// A kernel that lacks a barrier gives another result in another order.
void test_missing_barrier_shows() {
  std::vector<uint32_t> results[2];
  for (int i = 0; i < 2; ++i) {
    results[i].assign(64, 0);
    run_grid(
        {1, 1, 1}, 64, 64 * 4,
        [&] {
          uint32_t* words = reinterpret_cast<uint32_t*>(shared_memory());
          words[thread_id()] = static_cast<uint32_t>(thread_id());
          results[i][static_cast<size_t>(thread_id())] = words[thread_id() ^ 1];
        },
        kOrders[i]);
  }
  EXPECT(results[0] != results[1]);
}

// ---- What must end the process
// -------------------------------------------------------------------------------------

void expect_abort(int line, const char* message, const std::function<void()>& body) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[512];
  for (ssize_t got; (got = read(ends[0], buffer, sizeof(buffer))) > 0;)
    text.append(buffer, static_cast<size_t>(got));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT || text.find(message) == std::string::npos) {
    std::fprintf(stderr, "line %d: expected an abort with \"%s\", got status %d and:\n%s\n", line, message,
                 status, text.c_str());
    ++failures;
  }
}

#define EXPECT_ABORT(message, threads, ...) \
  expect_abort(__LINE__, message, [] { run_grid({1, 1, 1}, threads, 256, [] { __VA_ARGS__; }); })

void test_divergence() {
  EXPECT_ABORT("lanes of a warp are at different operations", 32, {
    float c[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (thread_id() == 7)
      shuffle_xor(1.0f, 1);
    else
      mma_f16(c, a, b);
  });
  // Half a warp at a shuffle, the other half at the block's barrier.
  EXPECT_ABORT("warp 0 lane 3 waits for shuffle_xor", 32, {
    if (thread_id() < 16)
      shuffle_xor(1.0f, 1);
    else
      sync_block();
  });
  EXPECT_ABORT("returned while others wait at a barrier", 64, {
    if (thread_id() == 5) return;
    sync_block();
  });
  EXPECT_ABORT("warp 0 lane 30 waits for shuffle_xor", 32, {
    if (thread_id() == 31) return;
    shuffle_xor(1.0f, 1);
  });
  EXPECT_ABORT("lanes of a warp are at different operations", 32, {
    if (thread_id() == 4)
      warp_max(1u);
    else
      warp_sum(1);
  });
  EXPECT_ABORT("without waiting for its copies", 32, {
    alignas(16) static uint32_t copied[4] = {};
    if (thread_id() == 0) copy_words4(copied, copied);
  });
  EXPECT_ABORT("without waiting for its copies", 32, {
    alignas(16) static uint32_t copied[4] = {};
    copy_word(copied, copied, false);
    commit_copies();
    wait_for_copy_groups<1>();
  });
  EXPECT_ABORT("multiple of 32", 33, {});
  EXPECT_ABORT("not in its cluster", 32, shared_of_block(shared_memory(), 1));
  EXPECT_ABORT("not in its shared memory", 32, {
    int local = 0;
    shared_of_block(&local, 0);
  });
  expect_abort(__LINE__, "returned while others wait at a barrier", [] {
    run_grid(
        {1, 2, 1}, 32, 256, [] { block_y() == 0 ? sync_cluster() : void(); }, Order::kForward, {}, false, 1,
        2);
  });
  expect_abort(__LINE__, "block 1 of the cluster, warp 0 lane 3 waits for sync_block", [] {
    run_grid(
        {1, 2, 1}, 64, 256,
        [] {
          if (block_y() == 0 || thread_id() >= 32)
            sync_cluster();
          else
            sync_block();
        },
        Order::kForward, {}, false, 1, 2);
  });
  expect_abort(__LINE__, "whole clusters",
               [] { run_grid({1, 3, 1}, 32, 256, [] {}, Order::kForward, {}, false, 1, 2); });
  expect_abort(__LINE__, "a block that has ended", [] {
    run_grid(
        {1, 2, 1}, 32, 256,
        [] {
          if (block_y() == 1) return;
          shuffle_xor(1.0f, 1);
          shared_of_block(shared_memory(), 1);
        },
        Order::kReverse, {}, false, 1, 2);
  });
  alignas(16) static const uint32_t words[8] = {};
  EXPECT_ABORT("misaligned", 32, load_stream(words + 1));
  EXPECT_ABORT("misaligned", 32, load_words4(words + 2));
  EXPECT_ABORT("misaligned", 32, copy_word(shared_memory() + 2, words, true));
}

// ---- Numbers
// -------------------------------------------------------------------------------------------------------

// float16 to float by integers alone.
uint32_t widen(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  int exponent = static_cast<int>(bits >> 10 & 31u);
  uint32_t fraction = bits & 1023u;
  if (exponent == 31) return sign | 0x7F800000u | fraction << 13;
  if (exponent == 0) {
    if (fraction == 0) return sign;
    for (exponent = 1; !(fraction & 1024u); --exponent) fraction <<= 1;
    fraction &= 1023u;
  }
  return sign | static_cast<uint32_t>(exponent + 112) << 23 | fraction << 13;
}

// The nearest of all finite float16, ties to the even one, by search.
uint16_t nearest_half(float value) {
  const double magnitude = std::fabs(static_cast<double>(value));
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (magnitude >= 65520.0) return static_cast<uint16_t>(sign | 0x7C00);
  uint32_t low = 0, high = 0x7BFF;  // the last one that is not above
  while (low < high) {
    const uint32_t middle = (low + high + 1) / 2;
    if (static_cast<double>(bits_float(widen(middle))) <= magnitude)
      low = middle;
    else
      high = middle - 1;
  }
  const double below = bits_float(widen(low));
  const double above = low == 0x7BFF ? 65536.0 : static_cast<double>(bits_float(widen(low + 1)));
  const bool up =
      magnitude - below > above - magnitude || (magnitude - below == above - magnitude && (low & 1u));
  return static_cast<uint16_t>(sign | (low + (up ? 1u : 0u)));
}

void test_half() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = half_to_float(static_cast<uint16_t>(bits));
    if ((bits & 0x7FFFu) > 0x7C00u) {
      EXPECT(std::isnan(value));
      EXPECT((float_to_half(value) & 0x7FFFu) > 0x7C00u);
      continue;
    }
    EXPECT(float_bits(value) == widen(bits));
    EXPECT(float_to_half(value) == bits);
    // Halfway to the next one, and a float to either side of that.
    if ((bits & 0x7FFFu) < 0x7BFFu) {
      const float half_way = 0.5f * (value + bits_float(widen(bits + 1)));
      for (int i = -1; i <= 1; ++i) {
        const float near = bits_float(float_bits(half_way) + static_cast<uint32_t>(i));
        EXPECT(float_to_half(near) == nearest_half(near));
      }
    }
  }
  for (const float value : {65519.996f, 65520.0f, 1e30f, INFINITY, 2.9802322e-8f, 2.9802326e-8f, 1e-45f})
    for (const float sign : {1.0f, -1.0f}) EXPECT(float_to_half(sign * value) == nearest_half(sign * value));
  for (int i = 0; i < 300000; ++i) {
    float value = bits_float(static_cast<uint32_t>(engine()));
    // Most of them in the range of float16.
    if (i % 8) value = bits_float((float_bits(value) & 0x807FFFFFu) | (100u + engine() % 45u) << 23);
    if (!std::isnan(value)) EXPECT(float_to_half(value) == nearest_half(value));
  }
}

void test_bfloat() {
  for (int i = 0; i < 300000; ++i) {
    const uint32_t bits = static_cast<uint32_t>(i % 2 ? engine() : (engine() & 0xFFFF0000u) | 0x8000u);
    const float value = bits_float(bits);
    const uint16_t result = float_to_bfloat(value);
    if (std::isnan(value)) {
      EXPECT(std::isnan(bits_float(static_cast<uint32_t>(result) << 16)));
      continue;
    }
    const uint32_t rest = bits & 0xFFFFu;
    const bool up = rest > 0x8000u || (rest == 0x8000u && (bits & 0x10000u));
    EXPECT(result == static_cast<uint16_t>((bits >> 16) + (up ? 1u : 0u)));
    EXPECT(float_bits(bfloat_to_float(result)) == static_cast<uint32_t>(result) << 16);
  }
  EXPECT(float_to_bfloat(INFINITY) == 0x7F80);
  EXPECT(float_to_bfloat(3.4e38f) == 0x7F80);
}

void test_integers() {
  for (int i = 0; i < 1000; ++i) {
    const uint32_t word = static_cast<uint32_t>(engine());
    int count = 0;
    for (int bit = 0; bit < 32; ++bit) count += word >> bit & 1u;
    EXPECT(popcount(word) == count);
    for (int bit = 0; bit < 16; ++bit) {
      const uint32_t pair = sign_pair_f16(word, bit);
      EXPECT(half_to_float(static_cast<uint16_t>(pair)) == (word >> bit & 1u ? -1.0f : 1.0f));
      EXPECT(half_to_float(static_cast<uint16_t>(pair >> 16)) == (word >> (bit + 16) & 1u ? -1.0f : 1.0f));
    }
  }
  EXPECT(fast_divide(1.0f, 4.0f) == 0.25f);
  EXPECT(multiply_rounded(1.0f + 0x1p-23f, 1.0f - 0x1p-23f) - 1.0f == 0.0f);
  // Where rounding twice loses the whole result.
  EXPECT(fused_multiply_add(1.0f + 0x1p-23f, 1.0f - 0x1p-23f, -1.0f) == -0x1p-46f);
}

}  // namespace

int main() {
  test_mma_b1();
  test_mma_f16();
  test_mma_s8();
  test_shuffle();
  test_reductions();
  test_copies();
  test_copy_groups();
  test_barriers();
  test_clusters();
  test_missing_barrier_shows();
  test_divergence();
  test_half();
  test_bfloat();
  test_integers();
  if (failures > 0) return EXIT_FAILURE;
  std::printf("passed\n");
  return EXIT_SUCCESS;
}
