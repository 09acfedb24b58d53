#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <string>

// One call of parallel_for. It lies on the stack of the calling thread, which waits until no worker is in it.
struct ThreadPool::Job {
  lb2_task task;
  void* context;
  int64_t n;
  int64_t chunk;
  std::atomic<int64_t> next{0};  // the first item that nobody has taken
  int helpers = 0;               // workers inside; guarded by the pool's mutex

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= n) return;
      task(begin, std::min(n, begin + chunk), context);
    }
  }
};

ThreadPool::ThreadPool(int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be >= 1, got " + std::to_string(threads));
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

int32_t ThreadPool::parallel_for(void* context, int64_t n, int64_t grain, lb2_task task,
                                 void* task_context) noexcept {
  if (n <= 0) return 0;
  auto& pool = *static_cast<ThreadPool*>(context);
  const int64_t threads = pool.threads();
  const int64_t even = n / threads + (n % threads != 0);
  Job job{task, task_context, n, std::max<int64_t>({1, grain, even})};
  try {
    pool.run(job);
  } catch (const std::exception&) {
    return 1;  // nothing may be thrown through C
  }
  return 0;
}

void ThreadPool::run(Job& job) {
  if (job.chunk >= job.n) return job.work();  // nothing to share
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(&job);
  }
  changed_.notify_all();
  job.work();
  std::unique_lock<std::mutex> lock(mutex_);
  remove(&job);
  changed_.wait(lock, [&] { return job.helpers == 0; });
}

void ThreadPool::serve() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Job& job = *jobs_.front();
    ++job.helpers;
    lock.unlock();
    job.work();
    lock.lock();
    remove(&job);
    // The last one out wakes the caller, which may destroy the job as soon as the mutex is free.
    if (--job.helpers == 0) changed_.notify_all();
  }
}

void ThreadPool::remove(const Job* job) {
  jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
}
