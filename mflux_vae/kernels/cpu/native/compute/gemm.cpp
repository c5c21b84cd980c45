#include "compute/gemm.h"

#include <algorithm>

#include "compute/pool.h"
#include "compute/workspace.h"

namespace mflux {
namespace {

constexpr int64_t DEPTH = 512;  // rows of b that are packed at once
constexpr int64_t PAD = 16;     // numbers after a copied row: powers of two would share lines of the cache
constexpr int64_t NEAR = 1024;  // numbers between rows of a up to which they need no copy
// Rows of a up to which packing b takes longer than dot products. They round otherwise, so this is less than a prompt has.
constexpr int64_t FEW_ROWS = 8;

/// The epilogue of columns from `left` on, and of results from number `at` on.
Epilogue part_of(Epilogue last, int64_t left, int64_t at) {
  last.bias = last.bias ? last.bias + left : nullptr;
  last.residual = last.residual ? last.residual + at : nullptr;
  return last;
}

/// The matrix a: in memory, or copied by a function.
struct Left {
  Reader read;
  const float* data = nullptr;
  int64_t step = 0;  // from one row of data to the next
};

/// Of a matrix whose rows or columns are contiguous.
Left left_of(Matrix a) {
  if (a.columns == 1 && a.rows <= NEAR) {
    return {{}, a.data, a.rows};
  }
  return {[a](int64_t top, int64_t m, int64_t from, int64_t k, float* to, int64_t step) {
    const float* data = a.data + top * a.rows + from * a.columns;
    if (a.columns != 1) {
      kernels()->transpose(data, a.columns, k, m, to, step);
      return;
    }
    for (int64_t i = 0; i < m; i++) {
      std::copy_n(data + i * a.rows, k, to + i * step);
    }
  }};
}

/// All rows of some columns of a are copied if need be, then threads take columns of b.
void product_of_some_rows(const Left& a, const Packer& b, Rows<float> c, int64_t m, int64_t n, int64_t k,
                          const Epilogue& last, bool add) {
  constexpr int64_t GROUP = 48, SPAN = 48, HELD = 1 << 20;  // rows copied at once, columns of b, numbers of a
  const int64_t groups = up(m, GROUP) / GROUP, nr = kernels()->tile_columns;
  const int64_t span = std::clamp(up(up(n, 4 * threads()) / (4 * threads()), nr), nr, up(SPAN, nr));
  const int64_t spans = up(n, span) / span;
  const int64_t heights = std::clamp<int64_t>(2 * threads() / spans, 1, groups);  // few columns: threads share rows, too
  const int64_t height = up(groups, heights) / heights * GROUP, jobs = spans * (up(m, height) / height);
  const int64_t held = a.data ? k : std::min(k, std::max<int64_t>(HELD / (m * DEPTH), 1) * DEPTH);
  const int64_t step = a.data ? a.step : std::min(k, DEPTH) + PAD;
  const Floats rows = floats(a.data ? 0 : up(held, DEPTH) / DEPTH * m * step);  // (chunk of columns, m, step)
  for (int64_t done = 0; done < k; done += held) {
    const int64_t end_of_held = std::min(k, done + held), chunks = up(end_of_held - done, DEPTH) / DEPTH;
    const auto depth = [&](int64_t chunk) { return std::min(DEPTH, end_of_held - done - chunk * DEPTH); };
    parallel_for(a.data ? 0 : chunks * groups, 1 + 16384 / (GROUP * std::min(k, DEPTH)), [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++) {
        const int64_t chunk = part / groups, top = part % groups * GROUP;
        a.read(top, std::min(GROUP, m - top), done + chunk * DEPTH, depth(chunk), rows.get() + (chunk * m + top) * step,
               step);
      }
    });
    parallel_for(jobs, 1 + 32768 * jobs / (m * k * n), [&](int64_t begin, int64_t end) {
      const Floats packed = floats(span * std::min(k, DEPTH));
      for (int64_t job = begin; job < end; job++) {
        const int64_t left = job % spans * span, top = job / spans * height, columns = std::min(span, n - left);
        const Rows<float> to = c.part(top, left);
        const Epilogue mine = part_of(last, left, to.data - c.data);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          const int64_t from = done + chunk * DEPTH;
          b(from, depth(chunk), left, columns, packed.get());
          kernels()->product_parts({a.data ? a.data + top * step + from : rows.get() + (chunk * m + top) * step, step},
                                   {1, depth(chunk)}, packed.get(), to, std::min(height, m - top), columns,
                                   add || from > 0, from + depth(chunk) == k ? &mine : nullptr);
        }
      }
    });
  }
}

/// Parts of b are packed for all threads, which take blocks of a.
void product_of_many_rows(const Left& a, const Packer& b, Rows<float> c, int64_t m, int64_t n, int64_t k,
                          const Epilogue& last, bool add) {
  constexpr int64_t ROWS = 120;      // of a: a block stays in the L2 cache
  constexpr int64_t COLUMNS = 1024;  // of b
  const int64_t nr = kernels()->tile_columns, blocks = up(up(m, ROWS) / ROWS, threads()),
                rows = up(up(m, blocks) / blocks, kernels()->tile_rows), down = up(m, rows) / rows;
  const int64_t columns = std::min(up(n, nr), up(COLUMNS, nr)), depth = std::min(k, DEPTH);
  const Floats packed = floats(columns * depth);
  for (int64_t left = 0; left < n; left += columns) {
    const int64_t width = std::min(columns, n - left);
    for (int64_t from = 0; from < k; from += depth) {
      const int64_t inner = std::min(depth, k - from);
      parallel_panels(width, 16384 / inner, [&](int64_t first, int64_t count) {
        b(from, inner, left + first, count, packed.get() + first * inner);
      });
      parallel_for(down, 1, [&](int64_t begin, int64_t end) {
        const int64_t step = a.data ? a.step : inner + PAD;
        const Floats block = floats(a.data ? 0 : rows * step);
        for (int64_t top = begin * rows; top < std::min(m, end * rows); top += rows) {
          const int64_t height = std::min(rows, m - top);
          const Rows<float> to = c.part(top, left);
          const Epilogue mine = part_of(last, left, to.data - c.data);
          if (!a.data) {
            a.read(top, height, from, inner, block.get(), step);
          }
          kernels()->product_parts({a.data ? a.data + top * step + from : block.get(), step}, {1, inner}, packed.get(), to,
                                   height, width, add || from > 0, from + inner == k ? &mine : nullptr);
        }
      });
    }
  }
}

void product(const Left& a, const Packer& b, Rows<float> c, int64_t m, int64_t n, int64_t k, const Epilogue& last,
             bool add) {
  if (m == 0 || n == 0) {
    return;
  }
  if (k == 0) {  // the epilogue of zeros
    const float none = 0;
    kernels()->product_parts({&none, 0}, {1, 0}, &none, c, m, n, add, &last);
    return;
  }
  (m <= SOME_ROWS ? product_of_some_rows : product_of_many_rows)(a, b, c, m, n, k, last, add);
}

}  // namespace

void parallel_panels(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  const int64_t nr = kernels()->tile_columns;
  parallel_for(up(n, nr) / nr, 1 + grain / nr, [&](int64_t begin, int64_t end) {
    work(begin * nr, std::min(end * nr, n) - begin * nr);
  });
}

void gemm(const Reader& a, const Packer& b, Rows<float> c, int64_t m, int64_t n, int64_t k, const Epilogue& last,
          bool add) {
  product({a}, b, c, m, n, k, last, add);
}

void gemm(Matrix a, const Packer& b, float* c, int64_t m, int64_t n, int64_t k, const Epilogue& last, bool add) {
  product(left_of(a), b, {c, n}, m, n, k, last, add);
}

void gemm(Matrix a, Matrix b, float* c, int64_t m, int64_t n, int64_t k, const Epilogue& last, bool add) {
  if (m <= FEW_ROWS && a.columns == 1 && b.rows == 1) {
    parallel_for(n, 1 + (1 << 15) / (k * m + 1), [&](int64_t begin, int64_t end) {
      kernels()->dot_products(a.data, a.rows, b.data + begin * b.columns, b.columns, c + begin, n, m, end - begin, k,
                              add, part_of(last, begin, begin));
    });
    return;
  }
  const Packer packer = [b](int64_t from, int64_t depth, int64_t left, int64_t count, float* packed) {
    kernels()->pack({b.data + from * b.rows + left * b.columns, b.rows, b.columns}, depth, count, packed);
  };
  gemm(a, packer, c, m, n, k, last, add);
}

}  // namespace mflux
