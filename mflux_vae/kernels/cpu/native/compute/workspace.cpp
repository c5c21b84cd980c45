#include "compute/workspace.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "mlx/allocator.h"
#include "mlx/memory.h"

namespace mflux {
namespace {

namespace mx = mlx::core;

constexpr size_t COUNTED = 1 << 20, HUGE_PAGE = 2 << 20, LINE = 64;  // bytes

}  // namespace

void Release::operator()(float* numbers) const {
  if (buffer) {
    mx::allocator::allocator().free(mx::allocator::Buffer(buffer));
  } else {
    ::operator delete[](numbers, std::align_val_t(LINE));
  }
}

Floats floats(int64_t count) {
  const size_t bytes = count * sizeof(float);
  if (bytes < COUNTED) {
    return Floats(new (std::align_val_t(LINE)) float[count]);
  }
  auto buffer = mx::allocator::allocator().malloc(bytes + LINE);
  use_huge_pages(buffer.raw_ptr(), bytes);
  const auto begin = (reinterpret_cast<uintptr_t>(buffer.raw_ptr()) + LINE - 1) / LINE * LINE;
  return Floats(reinterpret_cast<float*>(begin), {buffer.ptr()});
}

void use_huge_pages(void* begin, size_t bytes) {
  if (bytes >= 2 * HUGE_PAGE) {
    const auto first = (reinterpret_cast<uintptr_t>(begin) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE,
               end = (reinterpret_cast<uintptr_t>(begin) + bytes) / HUGE_PAGE * HUGE_PAGE;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: a failure changes nothing
  }
}

void limit_cache() {
  static std::atomic<size_t> most{0};
  const size_t peak = std::max(most.load(), mx::get_peak_memory());
  most = peak;
  if (mx::get_active_memory() + mx::get_cache_memory() > peak) {
    mx::clear_cache();
  }
}

}  // namespace mflux
