#include "compute/window.h"

#include <algorithm>

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

Packer weight_packer(const Conv& conv, const float* weight) {
  const int64_t c = conv.c, o = conv.o, taps = conv.kh * conv.kw, nr = kernels()->tile_columns;
  if (!conv.turned) {
    return [=](int64_t from, int64_t k, int64_t left, int64_t n, float* packed) {
      kernels()->pack({weight + left * taps * c + from, 1, taps * c}, k, n, packed);
    };
  }
  return [=](int64_t from, int64_t k, int64_t left, int64_t n, float* packed) {
    for (int64_t first = 0; first < n; first += nr, packed += k * nr) {
      for (int64_t row = from, length; row < from + k; row += length) {  // of one tap
        const int64_t tap = taps - 1 - row / c, channel = row % c;
        length = std::min(c - channel, from + k - row);
        kernels()->pack({weight + (channel * taps + tap) * o + left + first, taps * o, 1}, length, std::min(nr, n - first),
                        packed + (row - from) * nr);
      }
    }
  };
}

}  // namespace mflux
