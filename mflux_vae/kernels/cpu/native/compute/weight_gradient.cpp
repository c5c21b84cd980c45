#include <algorithm>
#include <vector>

#include "compute/conv.h"
#include "compute/gemm.h"
#include "compute/pool.h"
#include "compute/window.h"
#include "compute/winograd.h"
#include "compute/workspace.h"

namespace mflux {
namespace {

constexpr int64_t MOST = 1 << 21;  // numbers of all parts of a sum together, if there are several

/// dweight (o, kh, kw, c), or (kh, kw, c, o) if `transposed`: windows and dy are read in place. If `boxes`, numbers of windows
/// are sums of 2 x 2 pixels.
void sum_in_place(const Conv& conv, const float* x, const float* dy, bool transposed, bool boxes, float* dweight) {
  constexpr int64_t NUMBERS = 96 * 1024, LEAST = 8;  // of x and dy at once; blocks, for threads to share
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, line = conv.kw * c, size = o * conv.kh * line, nr = kernel.tile_columns;
  const int64_t columns = (conv.out_width - 1) * conv.stride + conv.kw + boxes, row = columns * c, step = conv.stride * row;
  const int64_t d_row = conv.out_width * o, fit = std::max<int64_t>(NUMBERS / std::max<int64_t>(step + d_row, 1), 1);
  const int64_t wanted = std::max(up(conv.out_height, fit) / fit, LEAST / std::max<int64_t>(conv.batch, 1));
  const int64_t rows = std::max<int64_t>(up(conv.out_height, wanted) / wanted, 1);
  const int64_t blocks = up(conv.out_height, rows) / rows, count = conv.batch * blocks;
  const float* end_of_dy = dy + conv.batch * conv.out_height * d_row;
  std::vector<int64_t> at;  // of the numbers of a window
  for (int64_t i = 0; i < conv.kh * line; i++) {
    at.push_back(i / line * row + i % line);
  }
  parallel_sum(count, up(count * size, MOST) / MOST, size, dweight, [&](int64_t begin, int64_t end, float* partial) {
    const Floats window = floats(((rows - 1) * conv.stride + conv.kh + boxes) * row + nr);
    for (int64_t block = begin; block < end; block++) {
      const int64_t image = block / blocks, first = block % blocks * rows, height = std::min(rows, conv.out_height - first);
      const int64_t lines = (height - 1) * conv.stride + conv.kh;
      read_window(conv, {.x = x}, image, first * conv.stride - conv.top, lines + boxes, -conv.left, columns, window.get());
      for (int64_t i = 0; boxes && i < lines * row - c; i++) {
        window[i] = (window[i] + window[i + c]) + (window[i + row] + window[i + row + c]);
      }
      const float* d = dy + (image * conv.out_height + first) * d_row;
      if (transposed) {
        const int64_t length = height * d_row;
        const bool last = d + length + nr > end_of_dy;  // nothing is read beyond the array
        const Floats copy = floats(last ? length + nr : 0);
        d = last ? std::copy_n(d, length, copy.get()) - length : d;
        kernel.product_parts({window.get(), 0, at.data()}, {height, conv.out_width, step, conv.stride * c, d_row, o}, d,
                             {partial, o}, conv.kh * line, o, true, nullptr);
        continue;
      }
      for (int64_t r = 0; r < conv.kh; r++) {
        kernel.product_parts({d, 1}, {height, conv.out_width, d_row, o, step, conv.stride * c}, window.get() + r * row,
                             {partial + r * line, conv.kh * line}, o, line, true, nullptr);
      }
    }
  });
}

/// For few output channels: windows are of dy, and x is in place of dy.
void weight_gradient_by_inputs(const Conv& conv, const float* x, const float* dy, float* dweight) {
  const int64_t c = conv.c, o = conv.o, taps = conv.kh * conv.kw;
  const Conv swapped{.batch = conv.batch, .height = conv.out_height, .width = conv.out_width, .c = o, .o = c, .kh = conv.kh,
                     .kw = conv.kw, .stride = 1 << conv.doubled, .top = conv.kh - 1 - conv.top,
                     .left = conv.kw - 1 - conv.left, .out_height = conv.height, .out_width = conv.width};
  const Floats sums = floats(taps * o * c);
  sum_in_place(swapped, dy, x, /*transposed=*/true, /*boxes=*/conv.doubled, sums.get());
  for (int64_t tap = 0; tap < taps; tap++) {
    for (int64_t i = 0; i < o; i++) {
      std::copy_n(sums.get() + ((taps - 1 - tap) * o + i) * c, c, dweight + (i * taps + tap) * c);
    }
  }
}

}  // namespace

void weight_gradient(const Conv& conv, const float* x, const float* dy, float* dweight) {
  const int64_t c = conv.c, o = conv.o, pixels = conv.batch * conv.out_height * conv.out_width;
  const int64_t depth = conv.kh * conv.kw * c;
  if (conv.stride == 1 && o <= 4 && c >= 16 && conv.kh * conv.kw > 1) {
    weight_gradient_by_inputs(conv, x, dy, dweight);
    return;
  }
  if (winograd_pays(conv, 32)) {
    winograd_weight_gradient(conv, x, dy, dweight);
    return;
  }
  const bool large = conv.out_height * conv.out_width >= 128;
  if (large && c < o && conv.kw * c < kernels()->tile_columns) {  // numbers of a window would fill part of a panel
    const Floats sums = floats(depth * o);
    sum_in_place(conv, x, dy, /*transposed=*/true, /*boxes=*/false, sums.get());
    kernels()->transpose(sums.get(), o, depth, o, dweight, depth);
    return;
  }
  if (large && c <= 64 && pixels >= 4096 && depth * o <= MOST / 16) {
    sum_in_place(conv, x, dy, /*transposed=*/false, /*boxes=*/false, dweight);
    return;
  }
  constexpr int64_t LEAST = 512;  // pixels of a part of the sum
  const int64_t grain = std::max(LEAST, pixels * o * depth / MOST);
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

}  // namespace mflux
