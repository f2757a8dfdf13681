#include "thread_pool.h"

#include <pthread.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace cacovid::cpu {
namespace {

constexpr int max_threads = 256;

// How a thread rounds, and whether it flushes subnormal numbers to zero. A worker takes the caller's way for each job:
// otherwise it would keep that of the thread that happened to start it, and bits would depend on who computes them.
#if defined(__SSE2__)
using Rounding = unsigned int;
Rounding get_rounding() { return _mm_getcsr(); }
void set_rounding(const Rounding& r) { _mm_setcsr(r); }
#else
using Rounding = std::fenv_t;
Rounding get_rounding() {
  Rounding r;
  std::fegetenv(&r);
  return r;
}
void set_rounding(const Rounding& r) { std::fesetenv(&r); }
#endif

// The right to use the pool, if nobody else has it. Not a mutex: a nested call asks again on the thread that has it.
struct Turn {
  explicit Turn(std::atomic<bool>& taken) : busy(taken), mine(!taken.exchange(true, std::memory_order_acquire)) {}
  Turn(const Turn&) = delete;
  ~Turn() {
    if (mine) busy.store(false, std::memory_order_release);
  }
  std::atomic<bool>& busy;
  const bool mine;
};

class Pool {
 public:
  // One job at a time: `run` is called by the holder of `busy`.
  void run(int64_t chunks, int helpers, const std::function<void(int64_t)>& chunk) {
    std::unique_lock<std::mutex> lock(mutex_);
    try {
      while (static_cast<int>(workers_.size()) < helpers) {
        workers_.emplace_back([this, seen = generation_] { work(seen); });
      }
    } catch (const std::exception&) {  // no further thread to be had: those there are do the work
    }
    chunk_ = &chunk;
    rounding_ = get_rounding();
    chunks_ = chunks;
    next_.store(0, std::memory_order_relaxed);
    seats_ = helpers;
    active_ = 0;
    ++generation_;
    lock.unlock();
    wake_.notify_all();
    drain();
    lock.lock();
    seats_ = 0;  // workers that have not started yet stay out
    done_.wait(lock, [this] { return active_ == 0; });
    chunk_ = nullptr;
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  std::atomic<bool> busy{false};

 private:
  void drain() {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < chunks_;) (*chunk_)(i);
    } catch (...) {  // out of memory in a worker is the caller's error, not the process's end
      const std::lock_guard<std::mutex> lock(mutex_);
      error_ = std::current_exception();
    }
  }

  void work(uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (seats_ == 0) continue;
      --seats_;
      ++active_;
      set_rounding(rounding_);
      lock.unlock();
      drain();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* chunk_ = nullptr;
  int64_t chunks_ = 0;
  Rounding rounding_ = {};
  std::atomic<int64_t> next_{0};
  int seats_ = 0, active_ = 0;
  uint64_t generation_ = 0;
  std::exception_ptr error_;
};

// Never destroyed: workers wait on it until the process ends. After fork() the child has none of the
// threads and perhaps a locked mutex, so it starts with a new pool and leaves the old one behind.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  Pool* p = current.load(std::memory_order_acquire);
  if (p != nullptr) return *p;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
  (void)registered;
  Pool* fresh = new Pool;
  if (current.compare_exchange_strong(p, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *p;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t useful = std::min<int64_t>(std::min(threads, max_threads), (count + grain - 1) / grain);
  if (useful > 1) {
    Pool& p = pool();
    const Turn turn(p.busy);
    if (turn.mine) {
      // A few chunks a thread even out unequal rows.
      const int64_t size = std::max(grain, (count + 4 * useful - 1) / (4 * useful));
      const int64_t chunks = (count + size - 1) / size;
      p.run(chunks, static_cast<int>(useful - 1), [&](int64_t i) { body(i * size, std::min(count, (i + 1) * size)); });
      return;
    }
  }
  body(0, count);
}

}  // namespace cacovid::cpu
