// What a convolution reads: windows of an image, and weights.
#pragma once

#include <vector>

#include "compute/conv.h"
#include "compute/gemm.h"

namespace mflux {

/// A pixel of images of one size, by its index in all of them.
struct Pixel {
  int64_t height, width, image, row, column;

  Pixel(int64_t height, int64_t width, int64_t index)
      : height(height), width(width), image(index / (height * width)), row(index / width % height), column(index % width) {}

  void next() {
    if (++column == width) {
      column = 0;
      if (++row == height) {
        row = 0;
        image++;
      }
    }
  }
};

/// Rows [first, first + rows) and columns [left, left + columns) of what the kernel sees, zeros outside the image.
void read_window(const Conv& conv, const ConvArrays& in, int64_t image, int64_t first, int64_t rows, int64_t left,
                 int64_t columns, float* to);

// The matrix of windows (pixels of the result, kh * kw * c) of an image that is neither scaled nor activated.

/// Copies its rows, as the left side of a product.
Reader window_reader(const Conv& conv, const float* x);
/// Packs parts of it, as the right side.
Packer window_packer(const Conv& conv, const float* x);

/// Packs weights (o, kh, kw, c), or turned ones, as a matrix (kh * kw * c, o).
Packer weight_packer(const Conv& conv, const float* weight);
/// Packs some taps of weights (o, kh, kw, c) as a matrix (taps * o, c).
Packer turned_packer(const Conv& conv, const float* weight, const std::vector<int64_t>& taps);

}  // namespace mflux
