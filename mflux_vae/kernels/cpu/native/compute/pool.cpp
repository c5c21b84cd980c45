#include "compute/pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace mflux {
namespace {

constexpr int SPINS = 2000;  // 20 to 100 us, then a thread sleeps
constexpr int MOST_THREADS = 64;
thread_local bool inside = false;

int count_threads() {
  if (const char* given = std::getenv("OMP_NUM_THREADS")) {
    if (int number = std::atoi(given); number > 0) {
      return std::min(number, MOST_THREADS);
    }
  }
  cpu_set_t usable;
  const bool known = sched_getaffinity(0, sizeof usable, &usable) == 0;
  return std::clamp(known ? CPU_COUNT(&usable) : int(std::thread::hardware_concurrency()), 1, MOST_THREADS);
}

/// Wait until `value` differs from `before`.
template <class T>
void wait_for_change(const std::atomic<T>& value, T before) {
  for (int spins = 0; spins < SPINS; spins++) {
    if (value.load(std::memory_order_acquire) != before) {
      return;
    }
    __builtin_ia32_pause();
  }
  value.wait(before, std::memory_order_acquire);
}

/// One job at a time: workers and caller take parts of it from an atomic counter. The caller waits only for workers that
/// took part: those that other processes keep from running come too late and find the job closed.
class Pool {
 public:
  explicit Pool(int size) {
    try {
      for (int i = 1; i < size; i++) {
        std::thread([this] { serve(); }).detach();
      }
    } catch (const std::system_error&) {  // the system allows no more threads
    }
  }

  void run(int64_t count, int64_t part, const std::function<void(int64_t, int64_t)>& work) {
    std::lock_guard one_job(job_);
    work_ = &work;
    count_ = count;
    part_ = part;
    next_.store(0, std::memory_order_relaxed);
    error_ = nullptr;
    workers_.fetch_and(~CLOSED, std::memory_order_release);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    take_parts();
    for (uint32_t now = workers_.fetch_or(CLOSED, std::memory_order_acquire) | CLOSED; now != CLOSED;
         now = workers_.load(std::memory_order_acquire)) {
      wait_for_change(workers_, now);
    }
    if (error_) {
      std::rethrow_exception(error_);
    }
  }

 private:
  static constexpr uint32_t CLOSED = 1u << 31;

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
    for (uint32_t seen = 0;;) {
      wait_for_change(generation_, seen);
      seen = generation_.load(std::memory_order_acquire);
      if (!(workers_.fetch_add(1, std::memory_order_acquire) & CLOSED)) {
        take_parts();
      }
      if (workers_.fetch_sub(1, std::memory_order_release) == CLOSED + 1) {
        workers_.notify_one();
      }
    }
  }

  std::mutex job_, failing_;
  std::atomic<uint32_t> generation_{0};
  std::atomic<uint32_t> workers_{CLOSED};  // at work, and whether the job is closed to more of them
  std::atomic<int64_t> next_{0};
  const std::function<void(int64_t, int64_t)>* work_ = nullptr;
  int64_t count_ = 0, part_ = 1;
  std::exception_ptr error_;
};

/// Never deleted: threads of a module must not be joined while the interpreter unloads it. A forked process has no
/// workers, so it starts its pool anew.
Pool& pool() {
  static std::atomic<Pool*> current = nullptr;
  static std::mutex starting;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current = nullptr; });
  (void)registered;
  if (!current) {
    std::lock_guard lock(starting);
    if (!current) {
      current = new Pool(threads());
    }
  }
  return *current;
}

}  // namespace

int threads() {
  static const int number = count_threads();
  return inside ? 1 : number;
}

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  if (count <= 0) {
    return;
  }
  if (inside || threads() == 1 || count <= grain) {
    work(0, count);
    return;
  }
  // many parts: the last ones keep all threads at work
  const int64_t parts = std::min<int64_t>(16 * threads(), (count + grain - 1) / grain);
  pool().run(count, (count + parts - 1) / parts, work);
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
    parallel_for(items * size, 1 + 32768 / parts, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin, last; first < end; first = last) {  // of one item
        const int64_t item = first / size;
        last = std::min(end, (item + 1) * size);
        for (int64_t i = 0; i < parts; i++) {
          const float* from = partial + (item * parts + i) * size - item * size;
          for (int64_t j = first; j < last; j++) {
            out[j] += from[j];
          }
        }
      }
    });
  }
}

}  // namespace mflux
