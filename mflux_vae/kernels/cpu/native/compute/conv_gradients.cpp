#include <algorithm>
#include <utility>
#include <vector>

#include "compute/conv.h"
#include "compute/gemm.h"
#include "compute/pool.h"
#include "compute/window.h"
#include "compute/winograd.h"
#include "compute/workspace.h"

namespace mflux {
namespace {

/// For few output channels: windows of dy are copied, not of x.
void weight_gradient_by_inputs(const Conv& conv, const float* x, const float* dy, float* dweight) {
  constexpr int64_t DEPTH = 256;
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, taps = conv.kh * conv.kw, rows = taps * o, each = 1 << conv.doubled;
  const int64_t pixels = conv.batch * conv.height * conv.width;
  const Floats sums = floats(rows * c);  // (tap, o, c)
  parallel_sum(up(pixels, DEPTH) / DEPTH, 1, rows * c, sums.get(), [&](int64_t begin, int64_t end, float* partial) {
    const Floats windows = floats(rows * DEPTH), packed = floats(DEPTH * up(c, kernel.tile_columns));
    for (int64_t first = begin * DEPTH; first < std::min(pixels, end * DEPTH); first += DEPTH) {
      const int64_t depth = std::min(DEPTH, pixels - first);
      for (int64_t tap = 0; tap < taps; tap++) {
        const int64_t up_by = tap / conv.kw - conv.top, left_by = tap % conv.kw - conv.left;
        float* to = windows.get() + tap * o * DEPTH;
        for (int64_t p = 0, run; p < depth; p += run) {  // of one row of x
          const Pixel at(conv.height, conv.width, first + p);
          run = std::min(depth - p, conv.width - at.column);
          for (int64_t i = 0; i < o; i++) {
            std::fill_n(to + i * DEPTH + p, run, 0.f);
          }
          for (int64_t part = 0; part < each * each; part++) {  // each pixel of x is one of dy, or four
            const int64_t y = at.row * each - up_by + part / each, start = at.column * each - left_by + part % each;
            if (y < 0 || y >= conv.out_height) {
              continue;
            }
            const float* line = dy + (at.image * conv.out_height + y) * conv.out_width * o;
            const int64_t low = start < 0 ? std::min(run, up(-start, each) / each) : 0,
                          high = std::clamp(up(conv.out_width - start, each) / each, low, run);
            for (int64_t i = 0; i < o; i++) {
              for (int64_t j = low; j < high; j++) {
                to[i * DEPTH + p + j] += line[(start + j * each) * o + i];
              }
            }
          }
        }
      }
      kernel.pack({x + first * c, c, 1}, depth, c, packed.get());
      kernel.product(windows.get(), DEPTH, packed.get(), partial, c, rows, c, depth, true, nullptr);
    }
  });
  for (int64_t row = 0; row < rows; row++) {
    std::copy_n(sums.get() + row * c, c, dweight + (row % o * taps + row / o) * c);
  }
}

}  // namespace

void weight_gradient(const Conv& conv, const float* x, const float* dy, float* dweight) {
  const int64_t c = conv.c, o = conv.o, pixels = conv.batch * conv.out_height * conv.out_width;
  if (conv.stride == 1 && o <= 4 && c >= 16 && conv.kh * conv.kw > 1) {
    weight_gradient_by_inputs(conv, x, dy, dweight);
    return;
  }
  if (winograd_pays(conv, 32)) {
    winograd_weight_gradient(conv, x, dy, dweight);
    return;
  }
  constexpr int64_t LEAST = 512, MOST = 1 << 21;  // pixels of a part of the sum, and numbers of all parts
  const int64_t depth = conv.kh * conv.kw * c, grain = std::max(LEAST, pixels * o * depth / MOST);
  const Packer windows = window_packer(conv, x);
  if (pixels < 16 * grain) {  // threads share columns, and read all of x
    gemm(Matrix{dy, 1, o}, windows, dweight, o, depth, pixels, {});
    return;
  }
  parallel_sum(pixels, grain, o * depth, dweight, [&](int64_t begin, int64_t end, float* partial) {
    const Packer later = [&](int64_t from, int64_t k, int64_t left, int64_t n, float* packed) {
      windows(begin + from, k, left, n, packed);
    };
    gemm(Matrix{dy + begin * o, 1, o}, later, partial, o, depth, end - begin, {}, true);
  });
}

void input_gradient(const Conv& conv, const float* weight, const float* dy, const float* bias, float* dx) {
  // Pixels of dx with the same remainders by the stride see the same taps: each group is a convolution of dy.
  constexpr int64_t LEAST = 512, HELD = 1 << 20;  // pixels and numbers of the result at once
  const int64_t c = conv.c, o = conv.o, stride = conv.stride, filter = conv.kh * conv.kw * c;
  for (int64_t py = 0; py < std::min(stride, conv.height); py++) {
    for (int64_t px = 0; px < std::min(stride, conv.width); px++) {
      std::vector<std::pair<int64_t, int64_t>> taps;
      for (int64_t r = 0; r < conv.kh; r++) {
        for (int64_t s = 0; s < conv.kw; s++) {
          if ((py + conv.top - r) % stride == 0 && (px + conv.left - s) % stride == 0) {
            taps.emplace_back(r, s);
          }
        }
      }
      const int64_t rows = (conv.height - py + stride - 1) / stride, columns = (conv.width - px + stride - 1) / stride;
      const int64_t depth = int64_t(taps.size()) * o, pixels = conv.batch * rows * columns;
      // rows are pixels of the group, columns are channels of dy by tap
      const Reader windows = [&](int64_t top, int64_t m, int64_t from, int64_t k, float* to, int64_t step) {
        Pixel at(rows, columns, top);
        for (int64_t i = 0; i < m; i++, at.next()) {
          const int64_t y = at.row * stride + py + conv.top, x = at.column * stride + px + conv.left;
          for (int64_t j = 0, length; j < k; j += length) {
            const auto [r, s] = taps[(from + j) / o];
            const int64_t inside = (from + j) % o, row = (y - r) / stride, column = (x - s) / stride;
            length = std::min(o - inside, k - j);
            if (y < r || x < s || row >= conv.out_height || column >= conv.out_width) {
              std::fill_n(to + i * step + j, length, 0.f);
            } else {
              std::copy_n(dy + ((at.image * conv.out_height + row) * conv.out_width + column) * o + inside, length,
                          to + i * step + j);
            }
          }
        }
      };
      const Packer weights = [&](int64_t from, int64_t k, int64_t left, int64_t n, float* packed) {
        each_panel(n, [&](int64_t first, int64_t channels, int64_t width) {
          for (int64_t j = 0, length; j < k; j += length) {
            const auto [r, s] = taps[(from + j) / o];
            const int64_t inside = (from + j) % o;
            length = std::min(o - inside, k - j);
            kernels()->pack({weight + inside * filter + (r * conv.kw + s) * c + left + first, filter, 1},
                            length, channels, packed + first * k + j * width);
          }
        });
      };
      const int64_t held = std::min(pixels, std::max(LEAST, HELD / std::max<int64_t>(c, 1)));
      const Floats out = floats(held * c);
      for (int64_t first = 0; first < pixels; first += held) {
        const int64_t count = std::min(held, pixels - first);
        const Reader part = [&](int64_t top, int64_t m, int64_t from, int64_t k, float* to, int64_t step) {
          windows(first + top, m, from, k, to, step);
        };
        gemm(part, weights, out.get(), count, c, depth, {.bias = bias});
        parallel_for(count, 1 + GRAIN / (c + 1), [&](int64_t begin, int64_t end) {
          Pixel at(rows, columns, first + begin);
          for (int64_t i = begin; i < end; i++, at.next()) {
            const int64_t y = at.image * conv.height + at.row * stride + py, x = at.column * stride + px;
            std::copy_n(out.get() + i * c, c, dx + (y * conv.width + x) * c);
          }
        });
      }
    }
  }
}

}  // namespace mflux
