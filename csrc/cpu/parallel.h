// Running work through the caller's parallel_for.
#pragma once

#include <atomic>
#include <cinttypes>
#include <cstdint>
#include <thread>

#include "core/status.h"

namespace lb2::cpu {

// Runs body(begin, end) over [0, count), at least `grain` items at a time.
template <typename Body>
lb2_status run_parallel(lb2_parallel_for parallel_for, void* context, int64_t count, int64_t grain,
                        const Body& body) {
  if (parallel_for == nullptr || count <= grain) {
    body(int64_t{0}, count);
    return LB2_OK;
  }
  const auto task = [](int64_t begin, int64_t end, void* task_context) {
    (*static_cast<const Body*>(task_context))(begin, end);
  };
  const int32_t code = parallel_for(context, count, grain, task, const_cast<Body*>(&body));
  if (code != 0) return fail(LB2_ERROR_INTERNAL, "parallel_for failed with code %" PRId32, code);
  return LB2_OK;
}

// Phases of tasks in one parallel region: the tasks of a phase start when all of the phase before are done.
// Workers take tasks from a counter and wait only for tasks that another thread is running at that moment, so it
// does not matter how many threads serve them: a single one runs all tasks in order.
class Phases {
 public:
  static constexpr int kMost = 2;

  explicit Phases(const int64_t (&counts)[kMost]) : counts_{counts[0], counts[1]} {}

  // Runs run(phase, task, worker) for what is left; to be called once for every worker.
  template <typename Run>
  void work(int64_t worker, const Run& run) {
    for (int phase = 0; phase < kMost; ++phase) {
      for (int64_t task; (task = next_[phase].fetch_add(1, std::memory_order_relaxed)) < counts_[phase];) {
        run(phase, task, worker);
        done_[phase].fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; done_[phase].load(std::memory_order_acquire) < counts_[phase]; ++spins) pause(spins);
    }
  }

 private:
  static void pause(int spins) {
    constexpr int kPatience = 2000;
    if (spins > kPatience) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  const int64_t counts_[kMost];
  alignas(64) std::atomic<int64_t> next_[kMost] = {};
  alignas(64) std::atomic<int64_t> done_[kMost] = {};
};

}  // namespace lb2::cpu
