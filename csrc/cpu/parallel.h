// Runs work through the caller's parallel_for.
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

// Phases of tasks in one parallel region: the tasks of a phase start when all tasks of the previous phase are
// done. A worker first takes the tasks of its own range in order, because neighbors are neighbors in memory,
// then those left in other ranges. It waits only for tasks that another thread is running at that moment, so
// any number of threads can serve the workers: a single thread runs all tasks in order.
class Phases {
 public:
  static constexpr int kMost = 5;

  template <int kCount>
  Phases(const int64_t (&counts)[kCount], int64_t workers)
      : phases_(kCount), ranges_(workers < kMostRanges ? workers : kMostRanges) {
    static_assert(kCount <= kMost, "there is room for kMost phases");
    for (int phase = 0; phase < kCount; ++phase) {
      counts_[phase] = counts[phase];
      done_[phase].value.store(0, std::memory_order_relaxed);
      for (int64_t range = 0; range < ranges_; ++range)
        next_[phase][range].value.store(begin(phase, range), std::memory_order_relaxed);
    }
  }

  // Runs run(phase, task, worker) for the tasks left. Call it once per worker.
  template <typename Run>
  void work(int64_t worker, const Run& run) {
    for (int phase = 0; phase < phases_; ++phase) {
      if (counts_[phase] == 0) continue;
      for (int64_t i = 0; i < ranges_; ++i) {
        const int64_t range = (worker + i) % ranges_, end = begin(phase, range + 1);
        std::atomic<int64_t>& next = next_[phase][range].value;
        // Checked first: adding to an empty range would take its cache line from the other threads.
        while (next.load(std::memory_order_relaxed) < end) {
          const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
          if (task >= end) break;
          run(phase, task, worker);
          done_[phase].value.fetch_add(1, std::memory_order_release);
        }
      }
      // parallel_for waits for the tasks that the last phase leaves running.
      if (phase + 1 == phases_) return;
      for (int spins = 0; done_[phase].value.load(std::memory_order_acquire) < counts_[phase];) pause(&spins);
    }
  }

 private:
  static constexpr int64_t kMostRanges = 64;
  struct alignas(64) Counter {
    std::atomic<int64_t> value;  // set where it is used: most are not
  };

  int64_t begin(int phase, int64_t range) const { return counts_[phase] * range / ranges_; }

  static void pause(int* spins) {
    constexpr int kPatience = 2000;
    if (*spins == kPatience) return std::this_thread::yield();
    ++*spins;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  const int phases_;
  const int64_t ranges_;
  int64_t counts_[kMost];
  Counter next_[kMost][kMostRanges];
  Counter done_[kMost];
};

}  // namespace lb2::cpu
