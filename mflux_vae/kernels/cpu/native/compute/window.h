// What a convolution reads: windows of an image, and weights.
#pragma once

#include "compute/conv.h"
#include "compute/gemm.h"

namespace mflux {

/// Rows [first, first + rows) and columns [left, left + columns) of what the kernel sees, zeros outside the image.
void read_window(const Conv& conv, const ConvArrays& in, int64_t image, int64_t first, int64_t rows, int64_t left,
                 int64_t columns, float* to);

/// Packs weights (o, kh, kw, c), or turned ones, as a matrix (kh * kw * c, o).
Packer weight_packer(const Conv& conv, const float* weight);

}  // namespace mflux
