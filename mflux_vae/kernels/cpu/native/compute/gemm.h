// Matrix products on all threads.
#pragma once

#include <algorithm>
#include <functional>

#include "isa/kernels.h"

namespace mflux {

/// Rows of a up to which each thread packs the columns of b that it multiplies: one reads memory while another computes.
inline constexpr int64_t SOME_ROWS = 512;

/// The first multiple of `step` that is not below x.
inline int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

/// Call `work(left, columns, width)` for each panel of n columns; `width` counts those that are zero, too.
template <class F>
void each_panel(int64_t n, F&& work) {
  for (int64_t left = 0, width; left < n; left += width) {
    width = kernels()->panel_columns(n - left);
    work(left, std::min(width, n - left), width);
  }
}

/// Call `work(left, columns)` on all threads for parts of n columns: whole panels of `each_panel(n)`, at least `grain` columns
/// if there are as many.
void parallel_panels(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& work);

/// Packs rows [from, from + k) and columns [left, left + n) of b into panels, as `Kernels::pack` does.
using Packer = std::function<void(int64_t from, int64_t k, int64_t left, int64_t n, float* packed)>;

/// Copies rows [top, top + m) and columns [from, from + k) of a to rows that are `step` apart.
using Reader = std::function<void(int64_t top, int64_t m, int64_t from, int64_t k, float* to, int64_t step)>;

/// c (m, n) = a (m, k) b (k, n), or += if `add`; then the epilogue. Results do not depend on the number of threads. A matrix
/// a has contiguous rows or columns.
void gemm(const Reader& a, const Packer& b, Rows<float> c, int64_t m, int64_t n, int64_t k, const Epilogue& last,
          bool add = false);
void gemm(Matrix a, const Packer& b, float* c, int64_t m, int64_t n, int64_t k, const Epilogue& last, bool add = false);
void gemm(Matrix a, Matrix b, float* c, int64_t m, int64_t n, int64_t k, const Epilogue& last, bool add = false);

}  // namespace mflux
