#include "compute/pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace mflux {
namespace {

constexpr int SPINS = 2000;  // about 20 us, then a worker sleeps
thread_local bool inside = false;

int count_threads() {
  if (const char* given = std::getenv("OMP_NUM_THREADS")) {
    if (int number = std::atoi(given); number > 0) {
      return std::min(number, 64);
    }
  }
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof usable, &usable) == 0) {
    return std::clamp(CPU_COUNT(&usable), 1, 64);
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

/// One job at a time: workers and caller take parts of it from an atomic counter.
class Pool {
 public:
  explicit Pool(int size) {
    for (int i = 1; i < size; i++) {
      workers_.emplace_back([this] { serve(); });
    }
  }

  ~Pool() {
    {
      std::lock_guard lock(sleeping_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& worker : workers_) {
      worker.join();
    }
  }

  void run(int64_t count, int64_t part, const std::function<void(int64_t, int64_t)>& work) {
    std::lock_guard one_job(job_);
    work_ = &work;
    count_ = count;
    part_ = part;
    next_.store(0, std::memory_order_relaxed);
    error_ = nullptr;
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard lock(sleeping_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_parts();
    for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; spins++) {
      if (spins > SPINS) {
        std::this_thread::yield();
      } else {
        __builtin_ia32_pause();
      }
    }
    if (error_) {
      std::rethrow_exception(error_);
    }
  }

 private:
  void take_parts() {
    inside = true;
    try {
      for (int64_t begin; (begin = next_.fetch_add(part_, std::memory_order_relaxed)) < count_;) {
        (*work_)(begin, std::min(begin + part_, count_));
      }
    } catch (...) {
      std::lock_guard lock(failing_);
      error_ = std::current_exception();
    }
    inside = false;
  }

  void serve() {
    uint64_t seen = 0;
    while (true) {
      for (int spins = 0; spins < SPINS && generation_.load(std::memory_order_acquire) == seen; spins++) {
        __builtin_ia32_pause();
      }
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(sleeping_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) {
        return;
      }
      take_parts();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex job_, sleeping_, failing_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  const std::function<void(int64_t, int64_t)>* work_ = nullptr;
  int64_t count_ = 0, part_ = 1;
  std::exception_ptr error_;
  bool stop_ = false;
};

}  // namespace

int threads() {
  static const int number = count_threads();
  return number;
}

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  if (count <= 0) {
    return;
  }
  if (inside || threads() == 1 || count <= grain) {
    work(0, count);
    return;
  }
  // leaked: threads of a module must not be joined while the interpreter unloads it
  static Pool* const pool = new Pool(threads());
  int64_t parts = std::min<int64_t>(4 * threads(), (count + grain - 1) / grain);
  pool->run(count, (count + parts - 1) / parts, work);
}

void parallel_sum(int64_t count, int64_t grain, int64_t size, float* out,
                  const std::function<void(int64_t, int64_t, float*)>& work) {
  parallel_sums(1, count, grain, size, out,
                [&](int64_t, int64_t begin, int64_t end, float* partial) { work(begin, end, partial); });
}

void parallel_sums(int64_t items, int64_t count, int64_t grain, int64_t size, float* out,
                   const std::function<void(int64_t, int64_t, int64_t, float*)>& work) {
  std::fill_n(out, items * size, 0.f);
  if (count <= 0) {
    return;
  }
  constexpr int64_t MOST = 32;
  const int64_t length = std::max<int64_t>({grain, (count + MOST - 1) / MOST, 1}), parts = (count + length - 1) / length;
  std::vector<float> sums(parts > 1 ? items * parts * size : 0);
  float* const partial = parts > 1 ? sums.data() : out;
  parallel_for(items * parts, std::max<int64_t>(grain / count, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % parts * length;
      work(i / parts, first, std::min(first + length, count), partial + i * size);
    }
  });
  if (parts > 1) {
    parallel_for(items, std::max<int64_t>(1, 65536 / (parts * std::max<int64_t>(size, 1))), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; item++) {
        for (int64_t i = 0; i < parts; i++) {
          for (int64_t j = 0; j < size; j++) {
            out[item * size + j] += partial[(item * parts + i) * size + j];
          }
        }
      }
    });
  }
}

}  // namespace mflux
