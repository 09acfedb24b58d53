// Executes a CUDA kernel's grid on the host: blocks one after another, the threads of a block as fibers that
// take turns at barriers and warp-wide operations. What would be undefined or hang on a GPU (lanes at
// different operations, a barrier that not all threads reach) ends the process with a message.
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

// Calls `kernel` once per thread. `seed` is that of kShuffled. Each block gets `shared_bytes` of dynamic
// shared memory, filled with 0xFF (NaN).
void run_grid(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& kernel,
              Order order = Order::kForward, uint32_t seed = 1);

namespace host {

struct Position {
  int thread, x, y, z;
};
const Position& position();
unsigned char* shared();
void sync_block();

// Copies to shared memory that the current thread has not waited for.
struct PendingCopy {
  void* to;
  Words4 value;
};
std::vector<PendingCopy>& pending_copies();

// Waits until all lanes of the warp have arrived at the same operation; the last one to arrive calls
// `complete` with the slots of all lanes.
void warp_operation(const char* name, void* slot, void (*complete)(void** slots));

}  // namespace host
}  // namespace lb2::cuda
