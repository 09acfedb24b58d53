#include "cuda_host/run_grid.h"

#include "cuda_host/cuda_runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define LB2_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LB2_ASAN 1
#endif
#endif
#ifdef LB2_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __SANITIZE_THREAD__
#error "ThreadSanitizer does not follow fibers: leave these tests out"
#endif

// Outside of all namespaces: a C name in an unnamed one may be taken for one that must be defined here.
#if defined(__x86_64__)
extern "C" void lb2_switch_stack(void** from, void* to);
asm(R"(
.text
.p2align 4
.type lb2_switch_stack,@function
lb2_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lb2_switch_stack,.-lb2_switch_stack
)");
#endif

namespace lb2::cuda {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kLanes = 32;

struct Warp {
  const char* operation = nullptr;
  void* slots[kLanes] = {};
  int arrived = 0;
  uint64_t generation = 0;
};

// A stack to switch to and from. Own switching where it is a few instructions: swapcontext calls the kernel.
struct Fiber {
  std::unique_ptr<char[]> stack;
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  bool done = false;
  const char* waits_for = nullptr;
  const uint64_t* generation = nullptr;  // runnable once it is no longer `seen`
  uint64_t seen = 0;
  host::PendingCopies copies;
  bool waited = false;  // for the kernel before this one
  bool runnable() const { return !done && (generation == nullptr || *generation != seen); }
};

// A barrier of all threads of a block or of a cluster.
struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Block {
  unsigned char* shared = nullptr;
  Barrier barrier;
  int finished = 0;  // threads
};

struct Cluster {
  const std::function<void()>* kernel = nullptr;
  std::vector<Block> blocks;
  int threads = 0;            // of a block
  std::vector<Fiber> fibers;  // those of a block after those of another
  std::vector<Warp> warps;
  Fiber scheduler;
  int current = 0;               // fiber
  host::Position position = {};  // of the first block
  std::vector<int> turns;        // fibers in the order in which they are asked
  std::mt19937 engine;
  size_t shared_bytes = 0;
  Barrier barrier;
  int finished = 0;
  const std::vector<Region>* guarded = nullptr;
  bool are_guarded = false;
  bool must_wait = false;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;

  Block& own_block() { return blocks[static_cast<size_t>(current / threads)]; }
};

Cluster cluster;

void guard(bool on) {
  if (cluster.are_guarded == on) return;
  cluster.are_guarded = on;
#ifdef LB2_ASAN
  for (const Region& region : *cluster.guarded) {
    if (on)
      ASAN_POISON_MEMORY_REGION(region.data, region.bytes);
    else
      ASAN_UNPOISON_MEMORY_REGION(region.data, region.bytes);
  }
#endif
}

[[noreturn]] void stop(const char* what) {
  const host::Position& at = host::position();
  const size_t threads = static_cast<size_t>(cluster.threads);
  std::fprintf(stderr, "cuda_host: block (%d, %d, %d), warp %d lane %d: %s\n", at.x, at.y, at.z,
               at.thread / kLanes, at.thread % kLanes, what);
  for (size_t i = 0; i < cluster.fibers.size(); ++i)
    if (!cluster.fibers[i].done && cluster.fibers[i].waits_for != nullptr)
      std::fprintf(stderr, "  block %zu of the cluster, warp %zu lane %zu waits for %s\n", i / threads,
                   i % threads / kLanes, i % kLanes, cluster.fibers[i].waits_for);
  std::abort();
}

void switch_fiber(Fiber& from, Fiber& to, bool to_scheduler, bool last) {
#ifdef LB2_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack,
                                 to_scheduler ? cluster.main_stack : to.stack.get(),
                                 to_scheduler ? cluster.main_stack_bytes : kStackBytes);
#else
  (void)to_scheduler;
  (void)last;
#endif
#if defined(__x86_64__)
  lb2_switch_stack(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef LB2_ASAN
  // Back on `from`. A fiber that had gone to the scheduler comes from there; the scheduler comes from a
  // fiber.
  __sanitizer_finish_switch_fiber(from.fake_stack, to_scheduler ? &cluster.main_stack : nullptr,
                                  to_scheduler ? &cluster.main_stack_bytes : nullptr);
#endif
}

void fiber_main() {
#ifdef LB2_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &cluster.main_stack, &cluster.main_stack_bytes);
#endif
  Fiber& self = cluster.fibers[static_cast<size_t>(cluster.current)];
  (*cluster.kernel)();
  if (!self.copies.copies.empty()) stop("returned without waiting for its copies to shared memory");
  if (cluster.must_wait && !self.waited) stop("returned without waiting for the kernel before");
  self.done = true;
  ++cluster.finished;
  Block& own = cluster.own_block();
  if (own.barrier.arrived > 0 || cluster.barrier.arrived > 0) stop("returned while others wait at a barrier");
  ++own.finished;
  switch_fiber(self, cluster.scheduler, true, true);
  std::abort();
}

void start(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack.reset(new char[kStackBytes]);
#ifdef LB2_ASAN
  // The frame in which the last thread on it ended never returned.
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStackBytes);
#endif
  fiber.done = false;
  fiber.copies.group_ends.clear();
  fiber.waits_for = nullptr;
  fiber.waited = false;
  fiber.generation = nullptr;
  fiber.fake_stack = nullptr;
#if defined(__x86_64__)
  // As lb2_switch_stack leaves a stack: six registers and a return address, at which rsp is 8 past a multiple
  // of 16.
  uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStackBytes) & ~uintptr_t{15};
  void** sp = reinterpret_cast<void**>(top) - 2;
  sp[0] = reinterpret_cast<void*>(&fiber_main);
  sp[1] = nullptr;
  for (int i = 1; i <= 6; ++i) sp[-i] = nullptr;
  fiber.sp = sp - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

void wait(const char* what, const uint64_t* generation) {
  Fiber& self = cluster.fibers[static_cast<size_t>(cluster.current)];
  self.waits_for = what;
  self.generation = generation;
  self.seen = *generation;
  const int thread = cluster.current;
  switch_fiber(self, cluster.scheduler, true, false);
  cluster.current = thread;
  self.waits_for = nullptr;
  self.generation = nullptr;
}

void run_cluster(Order order) {
  for (Fiber& fiber : cluster.fibers) start(fiber);
  for (Warp& warp : cluster.warps) warp = {};
  for (Block& block : cluster.blocks) block.barrier = {};
  cluster.barrier = {};
  cluster.finished = 0;
  while (cluster.finished < static_cast<int>(cluster.fibers.size())) {
    bool moved = false;
    if (order == Order::kShuffled) std::shuffle(cluster.turns.begin(), cluster.turns.end(), cluster.engine);
    for (const int thread : cluster.turns) {
      Fiber& fiber = cluster.fibers[static_cast<size_t>(thread)];
      if (!fiber.runnable()) continue;
      moved = true;
      cluster.current = thread;
      guard(!fiber.waited);
      switch_fiber(cluster.scheduler, fiber, false, false);
    }
    guard(false);
    if (!moved) stop("no thread can go on; what each waits for:");
  }
}

void arrive(const char* name, Barrier& barrier, int threads, int finished) {
  if (finished > 0) stop("at a barrier after others returned");
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  wait(name, &barrier.generation);
}

}  // namespace

namespace host {

const Position& position() {
  static Position own;
  own = cluster.position;
  own.thread = cluster.current % cluster.threads;
  own.y += cluster.current / cluster.threads;
  return own;
}

unsigned char* shared() { return cluster.own_block().shared; }

void* shared_of_block(void* own, int rank) {
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size()))
    stop("looks for a block that is not in its cluster");
  const std::ptrdiff_t offset = static_cast<unsigned char*>(own) - shared();
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(cluster.shared_bytes))
    stop("maps what is not in its shared memory");
  const Block& other = cluster.blocks[static_cast<size_t>(rank)];
  if (other.finished == cluster.threads) stop("looks into the shared memory of a block that has ended");
  return other.shared + offset;
}

Runtime& runtime() {
  static Runtime runtime;
  return runtime;
}

PendingCopies& pending_copies() { return cluster.fibers[static_cast<size_t>(cluster.current)].copies; }

void sync_block() {
  Block& own = cluster.own_block();
  arrive("sync_block", own.barrier, cluster.threads, own.finished);
}

void sync_cluster() {
  arrive("sync_cluster", cluster.barrier, static_cast<int>(cluster.fibers.size()), cluster.finished);
}

void wait_for_previous_kernel() {
  cluster.fibers[static_cast<size_t>(cluster.current)].waited = true;
  guard(false);
}

void let_next_kernel_start() {
  if (!cluster.fibers[static_cast<size_t>(cluster.current)].waited)
    stop("lets the next kernel start before it has waited for the one before");
}

void touch(const void* p) {
  const bool guarded = cluster.are_guarded;
  guard(false);
  (void)*static_cast<const volatile char*>(p);
  guard(guarded);
}

void warp_operation(const char* name, void* slot, void (*complete)(void** slots)) {
  Warp& warp = cluster.warps[static_cast<size_t>(cluster.current / kLanes)];
  if (warp.arrived == 0) warp.operation = name;
  if (std::strcmp(warp.operation, name) != 0) {
    cluster.fibers[static_cast<size_t>(cluster.current)].waits_for = name;
    stop("lanes of a warp are at different operations");
  }
  warp.slots[cluster.current % kLanes] = slot;
  if (++warp.arrived == kLanes) {
    complete(warp.slots);
    warp.arrived = 0;
    ++warp.generation;
    return;
  }
  wait(name, &warp.generation);
}

}  // namespace host

void run_grid(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& kernel, Order order,
              const std::vector<Region>& guarded, bool must_wait, uint32_t seed, int cluster_blocks) {
  cluster.threads = threads;
  if (threads % kLanes != 0) stop("the number of threads is no multiple of 32");
  if (grid.y % cluster_blocks != 0) stop("the grid is not one of whole clusters");
  cluster.kernel = &kernel;
  cluster.shared_bytes = shared_bytes;
  const size_t fibers = static_cast<size_t>(threads * cluster_blocks);
  if (cluster.fibers.size() != fibers) {
    cluster.fibers = std::vector<Fiber>(fibers);
    cluster.warps = std::vector<Warp>(fibers / kLanes);
  }
  cluster.guarded = &guarded;
  cluster.must_wait = must_wait;
  cluster.engine.seed(seed);
  cluster.turns.resize(fibers);
  std::iota(cluster.turns.begin(), cluster.turns.end(), 0);
  std::vector<int> clusters(static_cast<size_t>(grid.x * grid.y * grid.z / cluster_blocks));
  std::iota(clusters.begin(), clusters.end(), 0);
  if (order == Order::kReverse) {
    std::reverse(cluster.turns.begin(), cluster.turns.end());
    std::reverse(clusters.begin(), clusters.end());
  } else if (order == Order::kShuffled) {
    std::shuffle(clusters.begin(), clusters.end(), cluster.engine);
  }
  const int in_y = grid.y / cluster_blocks;
  for (const int index : clusters) {
    cluster.position = {0, index % grid.x, index / grid.x % in_y * cluster_blocks, index / grid.x / in_y};
    cluster.blocks.assign(static_cast<size_t>(cluster_blocks), {});
    for (Block& block : cluster.blocks) {
      // Exactly as many bytes as asked for: what lies beyond is AddressSanitizer's.
      void* memory = nullptr;
      if (posix_memalign(&memory, 128, shared_bytes) != 0) stop("out of memory");
      std::memset(memory, 0xFF, shared_bytes);
      block.shared = static_cast<unsigned char*>(memory);
    }
    run_cluster(order);
    for (const Block& block : cluster.blocks) std::free(block.shared);
  }
}

}  // namespace lb2::cuda
