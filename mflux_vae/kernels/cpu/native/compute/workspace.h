// Memory of arrays and of intermediate results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace mflux {

/// Uninitialised numbers, from the beginning of a line of the cache on. 1 MB and more comes from MLX, which counts it and
/// keeps it for the next call.
struct Release {
  void* buffer = nullptr;  // of MLX's allocator, or null

  void operator()(float* numbers) const;
};
using Floats = std::unique_ptr<float[], Release>;
Floats floats(int64_t count);

/// Ask for pages of 2 MB in a new large array. It is otherwise 500 times as many page faults, 0.6 s per GB.
void use_huge_pages(void* begin, size_t bytes);

/// Empty MLX's cache if it lifts the memory in use over the most that arrays needed at a time. MLX
/// reuses a buffer for an array of about its size only, so layers of other sizes would add theirs.
void limit_cache();

}  // namespace mflux
