// Executes a CUDA kernel's grid on the host: clusters of blocks one after another, the threads of a cluster
// as fibers that take turns at barriers and warp-wide operations. What would be undefined or hang on a GPU
// (lanes at different operations, a barrier that not all threads reach) ends the process with a message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace lb2::cuda {

struct alignas(16) Words4 {
  uint32_t w[4];
};

struct Grid {
  int x, y, z;
};

// Order in which blocks, and the threads of a block, take their turns: results must not depend on it.
enum class Order { kForward, kReverse, kShuffled };

struct Region {
  const void* data;
  size_t bytes;
};

// Calls `kernel` once per thread, with the `guarded` regions out of bounds for threads that have not waited
// for the kernel before this one. `seed` is that of kShuffled. Each block gets `shared_bytes` of dynamic
// shared memory, filled with 0xFF (NaN). A cluster is of `cluster_blocks` blocks that follow one another in
// y.
void run_grid(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& kernel,
              Order order = Order::kForward, const std::vector<Region>& guarded = {}, bool must_wait = false,
              uint32_t seed = 1, int cluster_blocks = 1);

namespace host {

struct Position {
  int thread, x, y, z;
};
const Position& position();
unsigned char* shared();
void sync_block();
// All threads of the cluster, and what `own`, in the block's shared memory, is in that of another of its
// cluster, which must not have ended.
void sync_cluster();
void* shared_of_block(void* own, int rank);

// Every thread must wait for the kernel before its own: before it lets the next one start, and before it
// ends. Until then it must not touch the regions that run_grid was told to guard, which AddressSanitizer sees
// to.
void wait_for_previous_kernel();
void let_next_kernel_start();
// Reads a byte, whether the thread has waited or not.
void touch(const void* p);

// Copies to shared memory that the current thread has not waited for, oldest first, and where each of its
// groups ends among them; the last ones may be of none yet.
struct PendingCopy {
  void* to;
  Words4 value;
  size_t bytes;
};
struct PendingCopies {
  std::vector<PendingCopy> copies;
  std::vector<size_t> group_ends;
};
PendingCopies& pending_copies();

// Waits until all lanes of the warp have arrived at the same operation; the last one to arrive calls
// `complete` with the slots of all lanes.
void warp_operation(const char* name, void* slot, void (*complete)(void** slots));

}  // namespace host
}  // namespace lb2::cuda
