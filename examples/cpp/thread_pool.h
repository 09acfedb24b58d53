// A pool of threads that serves the kernels' parallel_for, for any number of calls at the same time.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "littlebit2/littlebit2.h"

class ThreadPool {
 public:
  // `threads` run the tasks of a call, the calling thread among them.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // An lb2_parallel_for whose context is a ThreadPool. Returns 1 if there is no memory for the job.
  static int32_t parallel_for(void* context, int64_t n, int64_t grain, lb2_task task,
                              void* task_context) noexcept;

 private:
  struct Job;

  void run(Job& job);
  void serve();
  void stop();
  void remove(const Job* job);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job*> jobs_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};
