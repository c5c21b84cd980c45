#include "compute/gemm.h"

#include <algorithm>
#include <vector>

#include "compute/pool.h"
#include "compute/workspace.h"

namespace mflux {
namespace {

constexpr int64_t DEPTH = 256;           // of packed panels: a panel of b stays in the L1 cache
constexpr int64_t PAD = 16;              // numbers after a copied row: powers of two would share lines of the cache
constexpr int64_t BLOCK_ROWS = 120;      // of a: they stay in the L2 cache
constexpr int64_t BLOCK_COLUMNS = 1024;  // of b, packed: shared by all threads
// Rows of a up to which packing b takes longer than dot products. They round otherwise, so this is less than a prompt has.
constexpr int64_t FEW_ROWS = 8;

}  // namespace

void gemm(Matrix a, const Packer& b, float* c, int64_t m, int64_t n, int64_t k, const Epilogue& last, bool add) {
  const Kernels& kernel = *kernels();
  const int64_t mr = kernel.tile_rows, nr = kernel.tile_columns;
  if (m == 0 || n == 0) {
    return;
  }
  if (k == 0) {  // the epilogue of zeros
    const float none = 0;
    kernel.product(&none, 0, &none, c, n, m, n, 0, add, &last);
    return;
  }
  const int64_t columns = std::min(up(n, nr), up(BLOCK_COLUMNS, nr)), depth = std::min(k, DEPTH);
  const Floats packed_b = floats(columns * depth);
  // enough blocks for every thread: parts of the rows, and of the columns where there are few rows
  const int64_t wanted = (m + 2 * threads() - 1) / (2 * threads());
  const int64_t rows = std::clamp(up(wanted, mr), mr, up(BLOCK_ROWS, mr)), down = (m + rows - 1) / rows;
  for (int64_t left = 0; left < n; left += columns) {
    const int64_t width = std::min(columns, n - left), panels = up(width, nr) / nr;
    const int64_t across = std::min(panels, (2 * threads() + down - 1) / down), span = up(panels, across) / across * nr;
    for (int64_t from = 0; from < k; from += depth) {
      const int64_t inner = std::min(depth, k - from);
      parallel_for(panels, std::max<int64_t>(1, 16384 / (nr * inner)), [&](int64_t begin, int64_t end) {
        b(from, inner, left + begin * nr, std::min((end - begin) * nr, width - begin * nr),
          packed_b.get() + begin * nr * inner);
      });
      const bool ends = from + inner == k;
      const int64_t jobs = 2 * m * width * inner > 65536 ? 1 : down * across;  // small products run on one thread
      parallel_for(down * across, jobs, [&](int64_t begin, int64_t end) {
        const int64_t step = inner + PAD;
        const std::unique_ptr<float[]> copy(new float[rows * step]);
        int64_t copied = -1;
        for (int64_t job = begin; job < end; job++) {
          const int64_t block = job / across, top = block * rows, height = std::min(rows, m - top);
          const int64_t first = job % across * span, count = std::min(span, width - first);
          if (count <= 0) {
            continue;
          }
          const float* left_rows = a.data + top * a.rows + from * a.columns;
          if (copied != block) {
            copied = block;
            if (a.columns == 1) {
              for (int64_t i = 0; i < height; i++) {
                std::copy_n(left_rows + i * a.rows, inner, copy.get() + i * step);
              }
            } else {
              for (int64_t j = 0; j < inner; j++) {
                for (int64_t i = 0; i < height; i++) {
                  copy[i * step + j] = left_rows[i * a.rows + j * a.columns];
                }
              }
            }
          }
          Epilogue mine = last;
          const int64_t column = left + first;
          mine.bias = last.bias ? last.bias + column : nullptr;
          mine.residual = last.residual ? last.residual + top * n + column : nullptr;
          kernel.product(copy.get(), step, packed_b.get() + first * inner, c + top * n + column, n, height, count, inner,
                         add || from > 0, ends ? &mine : nullptr);
        }
      });
    }
  }
}

void gemm(Matrix a, Matrix b, float* c, int64_t m, int64_t n, int64_t k, const Epilogue& last, bool add) {
  if (m <= FEW_ROWS && a.columns == 1 && b.rows == 1) {
    parallel_for(n, 1 + (1 << 15) / (k * m + 1), [&](int64_t begin, int64_t end) {
      Epilogue mine = last;
      mine.bias = last.bias ? last.bias + begin : nullptr;
      mine.residual = last.residual ? last.residual + begin : nullptr;
      kernels()->dot_products(a.data, a.rows, b.data + begin * b.columns, b.columns, c + begin, n, m, end - begin, k,
                              add, mine);
    });
    return;
  }
  const Packer packer = [b](int64_t from, int64_t depth, int64_t left, int64_t count, float* packed) {
    kernels()->pack({b.data + from * b.rows + left * b.columns, b.rows, b.columns}, depth, count, packed);
  };
  gemm(a, packer, c, m, n, k, last, add);
}

}  // namespace mflux
