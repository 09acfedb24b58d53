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

struct Block {
  const std::function<void()>* kernel = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Fiber scheduler;
  int current = 0;
  host::Position position = {};
  std::vector<int> turns;  // threads in the order in which they are asked
  std::mt19937 engine;
  unsigned char* shared = nullptr;
  int at_barrier = 0;
  int finished = 0;
  uint64_t barrier_generation = 0;
  const std::vector<Region>* guarded = nullptr;
  bool are_guarded = false;
  bool must_wait = false;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
};

Block block;

void guard(bool on) {
  if (block.are_guarded == on) return;
  block.are_guarded = on;
#ifdef LB2_ASAN
  for (const Region& region : *block.guarded) {
    if (on)
      ASAN_POISON_MEMORY_REGION(region.data, region.bytes);
    else
      ASAN_UNPOISON_MEMORY_REGION(region.data, region.bytes);
  }
#endif
}

[[noreturn]] void stop(const char* what) {
  std::fprintf(stderr, "cuda_host: block (%d, %d, %d), warp %d lane %d: %s\n", block.position.x,
               block.position.y, block.position.z, block.current / kLanes, block.current % kLanes, what);
  for (size_t i = 0; i < block.fibers.size(); ++i)
    if (!block.fibers[i].done && block.fibers[i].waits_for != nullptr)
      std::fprintf(stderr, "  warp %zu lane %zu waits for %s\n", i / kLanes, i % kLanes,
                   block.fibers[i].waits_for);
  std::abort();
}

void switch_fiber(Fiber& from, Fiber& to, bool to_scheduler, bool last) {
#ifdef LB2_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack,
                                 to_scheduler ? block.main_stack : to.stack.get(),
                                 to_scheduler ? block.main_stack_bytes : kStackBytes);
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
  __sanitizer_finish_switch_fiber(from.fake_stack, to_scheduler ? &block.main_stack : nullptr,
                                  to_scheduler ? &block.main_stack_bytes : nullptr);
#endif
}

void fiber_main() {
#ifdef LB2_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block.main_stack, &block.main_stack_bytes);
#endif
  Fiber& self = block.fibers[static_cast<size_t>(block.current)];
  (*block.kernel)();
  if (!self.copies.copies.empty()) stop("returned without waiting for its copies to shared memory");
  if (block.must_wait && !self.waited) stop("returned without waiting for the kernel before");
  self.done = true;
  ++block.finished;
  if (block.at_barrier > 0) stop("returned while others wait at a barrier");
  switch_fiber(self, block.scheduler, true, true);
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
  Fiber& self = block.fibers[static_cast<size_t>(block.current)];
  self.waits_for = what;
  self.generation = generation;
  self.seen = *generation;
  const int thread = block.current;
  switch_fiber(self, block.scheduler, true, false);
  block.current = thread;
  self.waits_for = nullptr;
  self.generation = nullptr;
}

void run_block(int threads, Order order) {
  for (Fiber& fiber : block.fibers) start(fiber);
  for (Warp& warp : block.warps) warp = {};
  block.at_barrier = block.finished = 0;
  while (block.finished < threads) {
    bool moved = false;
    if (order == Order::kShuffled) std::shuffle(block.turns.begin(), block.turns.end(), block.engine);
    for (const int thread : block.turns) {
      Fiber& fiber = block.fibers[static_cast<size_t>(thread)];
      if (!fiber.runnable()) continue;
      moved = true;
      block.current = thread;
      block.position.thread = thread;
      guard(!fiber.waited);
      switch_fiber(block.scheduler, fiber, false, false);
    }
    guard(false);
    if (!moved) stop("no thread can go on; what each waits for:");
  }
}

}  // namespace

namespace host {

const Position& position() {
  block.position.thread = block.current;
  return block.position;
}

unsigned char* shared() { return block.shared; }

Runtime& runtime() {
  static Runtime runtime;
  return runtime;
}

PendingCopies& pending_copies() { return block.fibers[static_cast<size_t>(block.current)].copies; }

void sync_block() {
  if (block.finished > 0) stop("at a barrier after others returned");
  if (++block.at_barrier == static_cast<int>(block.fibers.size())) {
    block.at_barrier = 0;
    ++block.barrier_generation;
    return;
  }
  wait("sync_block", &block.barrier_generation);
}

void wait_for_previous_kernel() {
  block.fibers[static_cast<size_t>(block.current)].waited = true;
  guard(false);
}

void let_next_kernel_start() {
  if (!block.fibers[static_cast<size_t>(block.current)].waited)
    stop("lets the next kernel start before it has waited for the one before");
}

void warp_operation(const char* name, void* slot, void (*complete)(void** slots)) {
  Warp& warp = block.warps[static_cast<size_t>(block.current / kLanes)];
  if (warp.arrived == 0) warp.operation = name;
  if (std::strcmp(warp.operation, name) != 0) {
    block.fibers[static_cast<size_t>(block.current)].waits_for = name;
    stop("lanes of a warp are at different operations");
  }
  warp.slots[block.current % kLanes] = slot;
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
              const std::vector<Region>& guarded, bool must_wait, uint32_t seed) {
  if (threads % kLanes != 0) stop("the number of threads is no multiple of 32");
  block.kernel = &kernel;
  if (block.fibers.size() != static_cast<size_t>(threads)) {
    block.fibers = std::vector<Fiber>(static_cast<size_t>(threads));
    block.warps = std::vector<Warp>(static_cast<size_t>(threads / kLanes));
  }
  block.guarded = &guarded;
  block.must_wait = must_wait;
  block.engine.seed(seed);
  block.turns.resize(static_cast<size_t>(threads));
  std::iota(block.turns.begin(), block.turns.end(), 0);
  std::vector<int> blocks(static_cast<size_t>(grid.x * grid.y * grid.z));
  std::iota(blocks.begin(), blocks.end(), 0);
  if (order == Order::kReverse) {
    std::reverse(block.turns.begin(), block.turns.end());
    std::reverse(blocks.begin(), blocks.end());
  } else if (order == Order::kShuffled) {
    std::shuffle(blocks.begin(), blocks.end(), block.engine);
  }
  for (const int index : blocks) {
    block.position = {0, index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    // Exactly as many bytes as asked for: what lies beyond is AddressSanitizer's.
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes) != 0) stop("out of memory");
    std::memset(memory, 0xFF, shared_bytes);
    block.shared = static_cast<unsigned char*>(memory);
    run_block(threads, order);
    std::free(memory);
  }
}

}  // namespace lb2::cuda
