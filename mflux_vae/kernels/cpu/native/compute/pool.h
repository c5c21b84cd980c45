// A pool of threads for the loops of a kernel.
#pragma once

#include <cstdint>
#include <functional>

namespace mflux {

inline constexpr int64_t GRAIN = 8192;  // numbers that are worth another thread

/// Number of threads that compute, the calling one included: OMP_NUM_THREADS if set, otherwise the CPUs that the process
/// may use. 1 inside a parallel loop.
int threads();

/// Call `work(begin, end)` on parts of [0, count) of at least `grain` each, on all threads, and wait.
/// Calls from inside `work` run on the calling thread.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& work);

/// out (size,) = sum over parts of [0, count), to which `work(begin, end, partial)` adds. Parts are at least `grain` long
/// and do not depend on the number of threads, so neither does the result.
void parallel_sum(int64_t count, int64_t grain, int64_t size, float* out,
                  const std::function<void(int64_t, int64_t, float*)>& work);

/// out (items, size): `parallel_sum` of `work(item, begin, end, partial)` for each item.
void parallel_sums(int64_t items, int64_t count, int64_t grain, int64_t size, float* out,
                   const std::function<void(int64_t, int64_t, int64_t, float*)>& work);

}  // namespace mflux
