// Winograd's F(4x4, 3x3) for convolutions of 3 x 3 with stride 1 (Lavin & Gray 2015): 36 products of small matrices for
// tiles of 4 x 4 pixels, a quarter of the multiplications.
#pragma once

#include "compute/conv.h"

namespace mflux {

/// Whether this is the faster way: kernels of 3 x 3 with enough channels, and at least `tiles` tiles.
bool winograd_pays(const Conv& conv, int64_t tiles);

/// y (batch, out_height, out_width, o).
void winograd(const Conv& conv, const ConvArrays& in, float* y);

/// dweight (o, 3, 3, c). Holds 36 o c numbers, and both transforms of some tiles.
void winograd_weight_gradient(const Conv& conv, const float* x, const float* dy, float* dweight);

}  // namespace mflux
