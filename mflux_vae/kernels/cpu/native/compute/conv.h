// Convolutions on all threads; images NHWC, weights (o, kh, kw, c).
#pragma once

#include "isa/kernels.h"

namespace mflux {

/// A convolution with a stride, of an image that is scaled, shifted, activated and enlarged while it is read.
struct Conv {
  int64_t batch, height, width, c;  // of the array x
  int64_t o, kh, kw, stride, top, left;
  int64_t out_height, out_width;
  bool affine = false, silu = false, doubled = false;
  bool biased = false, residual = false;
  bool turned = false;  // weights are (c, kh, kw, o), and both axes flipped: an input gradient

  /// Size of the image that the kernel moves over.
  int64_t seen_height() const { return height << doubled; }
  int64_t seen_width() const { return width << doubled; }
  /// The convolution alone, of an image that is read as it is.
  Conv plain() const {
    Conv conv = *this;
    conv.affine = conv.silu = conv.doubled = conv.biased = conv.residual = false;
    return conv;
  }
  bool operator==(const Conv&) const = default;
};

struct ConvArrays {
  const float *x, *weight;
  const float *bias = nullptr, *residual = nullptr;
  const float *scale = nullptr, *shift = nullptr;  // (batch, c)
};

/// y (batch, out_height, out_width, o).
void convolve(const Conv& conv, const ConvArrays& in, float* y);

/// dweight (o, kh, kw, c) of a convolution of x; `affine` and `silu` are not applied.
void weight_gradient(const Conv& conv, const float* x, const float* dy, float* dweight);

/// dx (batch, height, width, c) of a strided convolution with weights (o, kh, kw, c), + bias (c,), if not null.
void input_gradient(const Conv& conv, const float* weight, const float* dy, const float* bias, float* dx);

}  // namespace mflux
