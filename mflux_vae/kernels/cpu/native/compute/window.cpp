#include "compute/window.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace mflux {

void read_window(const Conv& conv, const ConvArrays& in, int64_t image, int64_t first, int64_t rows, int64_t left,
                 int64_t columns, float* to) {
  const int64_t c = conv.c, width = conv.seen_width(), height = conv.seen_height();
  const float *scale = conv.affine ? in.scale + image * c : nullptr, *shift = conv.affine ? in.shift + image * c : nullptr;
  const int64_t begin = std::clamp<int64_t>(left, 0, width), end = std::clamp<int64_t>(left + columns, begin, width);
  for (int64_t r = 0; r < rows; r++) {
    float* line = to + r * columns * c;
    const int64_t y = first + r;
    if (y < 0 || y >= height || begin == end) {
      std::fill_n(line, columns * c, 0.f);
      continue;
    }
    std::fill_n(line, (begin - left) * c, 0.f);
    std::fill_n(line + (end - left) * c, (left + columns - end) * c, 0.f);
    float* out = line + (begin - left) * c;
    const float* from = in.x + (image * conv.height + (y >> conv.doubled)) * conv.width * c;
    if (!conv.doubled) {
      if (conv.affine || conv.silu) {
        kernels()->affine(from + begin * c, scale, shift, conv.silu, out, end - begin, c);
      } else {
        std::copy_n(from + begin * c, (end - begin) * c, out);
      }
      continue;
    }
    for (int64_t x = begin; x < end; x++, out += c) {
      if (x > begin && (x & 1)) {
        std::copy_n(out - c, c, out);
      } else if (conv.affine || conv.silu) {
        kernels()->affine(from + (x >> 1) * c, scale, shift, conv.silu, out, 1, c);
      } else {
        std::copy_n(from + (x >> 1) * c, c, out);
      }
    }
  }
}

namespace {

/// Row `r` of the kernel at a pixel, from number `inside` of its kw * c numbers on.
struct Part {
  const float* line;  // of the image; null outside of it
  int64_t start;      // of the numbers in that line

  Part(const Conv& conv, const float* x, const Pixel& at, int64_t r, int64_t inside)
      : line(nullptr), start((at.column * conv.stride - conv.left) * conv.c + inside) {
    const int64_t y = at.row * conv.stride + r - conv.top;
    if (y >= 0 && y < conv.seen_height()) {
      line = x + (at.image * conv.height + (y >> conv.doubled)) * conv.width * conv.c;
    }
  }

  /// Whether all of it is in the image as it is in memory.
  bool whole(const Conv& conv, int64_t length) const {
    return line && !conv.doubled && start >= 0 && start + length <= conv.width * conv.c;
  }

  void copy(const Conv& conv, int64_t length, float* to) const {
    if (!line) {
      std::fill_n(to, length, 0.f);
      return;
    }
    const int64_t c = conv.c, low = std::clamp<int64_t>(-start, 0, length),
                  high = std::clamp(conv.seen_width() * c - start, low, length);
    std::fill_n(to, low, 0.f);
    if (!conv.doubled) {
      std::copy_n(line + start + low, high - low, to + low);
    }
    for (int64_t i = low, run; conv.doubled && i < high; i += run) {  // of one pixel
      const int64_t pixel = (start + i) / c, channel = (start + i) % c;
      run = std::min(c - channel, high - i);
      std::copy_n(line + pixel / 2 * c + channel, run, to + i);
    }
    std::fill_n(to + high, length - high, 0.f);
  }
};

}  // namespace

Reader window_reader(const Conv& conv, const float* x) {
  return [=](int64_t top, int64_t m, int64_t from, int64_t k, float* to, int64_t step) {
    const int64_t line = conv.kw * conv.c;
    Pixel at(conv.out_height, conv.out_width, top);
    for (int64_t i = 0; i < m; i++, at.next()) {
      for (int64_t j = 0, length; j < k; j += length) {
        const int64_t r = (from + j) / line, inside = (from + j) % line;
        length = std::min(line - inside, k - j);
        Part(conv, x, at, r, inside).copy(conv, length, to + i * step + j);
      }
    }
  };
}

Packer window_packer(const Conv& conv, const float* x) {
  return [=](int64_t from, int64_t k, int64_t left, int64_t n, float* packed) {
    const int64_t line = conv.kw * conv.c;
    each_panel(n, [&](int64_t first, int64_t columns, int64_t width) {
      float* to = packed + first * k;
      if (columns < width) {
        std::fill_n(to, k * width, 0.f);
      }
      for (int64_t j = 0, length; j < columns; j += length) {
        const int64_t r = (left + first + j) / line, inside = (left + first + j) % line;
        length = std::min(line - inside, columns - j);
        Pixel at(conv.out_height, conv.out_width, from);
        for (int64_t p = 0, run = 1; p < k; p += run) {
          const Part part(conv, x, at, r, inside);
          run = 1;
          if (length == width && part.whole(conv, length)) {  // as many pixels of the row as can be
            const int64_t room = conv.width * conv.c - length - part.start, step = conv.stride * conv.c;
            run = std::min({k - p, conv.out_width - at.column, room / step + 1});
            kernels()->pack({part.line + part.start, step, 1}, run, width, to + p * width);
          } else {
            part.copy(conv, length, to + p * width + j);
          }
          at.column += run - 1;
          at.next();
        }
      }
    });
  };
}

Packer weight_packer(const Conv& conv, const float* weight) {
  const int64_t c = conv.c, taps = conv.kh * conv.kw;
  if (!conv.turned) {
    return [=](int64_t from, int64_t k, int64_t left, int64_t n, float* packed) {
      kernels()->pack({weight + left * taps * c + from, 1, taps * c}, k, n, packed);
    };
  }
  std::vector<int64_t> reversed(taps);
  std::iota(reversed.rbegin(), reversed.rend(), 0);
  Conv gradient = conv;
  std::swap(gradient.c, gradient.o);
  return turned_packer(gradient, weight, reversed);
}

Packer turned_packer(const Conv& conv, const float* weight, const std::vector<int64_t>& taps) {
  const int64_t c = conv.c, o = conv.o, filter = conv.kh * conv.kw * c;
  return [=](int64_t from, int64_t k, int64_t left, int64_t n, float* packed) {
    each_panel(n, [&](int64_t first, int64_t columns, int64_t width) {
      for (int64_t row = from, length; row < from + k; row += length) {  // of one tap
        const int64_t channel = row % o;
        length = std::min(o - channel, from + k - row);
        kernels()->pack({weight + channel * filter + taps[row / o] * c + left + first, filter, 1}, length, columns,
                        packed + first * k + (row - from) * width);
      }
    });
  };
}

}  // namespace mflux
