// Normalization per channel on all threads: x (batch, pixels, c).
#pragma once

#include "isa/kernels.h"

namespace mflux {

struct ChannelNorm {
  int64_t batch, pixels, c, groups;
  Activation activation;
  float slope, eps;

  bool operator==(const ChannelNorm&) const = default;
};

/// stats (2, batch, groups): mean and variance of each sample and group, in two passes.
void group_statistics(const ChannelNorm& norm, const float* x, float* stats);

/// y = activation((x - mean) / sqrt(variance + eps) * scale + shift); scale, shift: (c,).
void group_norm(const ChannelNorm& norm, const float* x, const float* scale, const float* shift, const float* stats,
                float* y);

/// Gradients of x, scale and shift, also through the statistics.
void group_norm_back(const ChannelNorm& norm, const float* x, const float* scale, const float* shift,
                     const float* stats, const float* dy, float* dx, float* dscale, float* dshift);

/// Factor and offset (batch, c) of each channel, so that x * factor + offset is normalized, scaled and shifted.
void group_affine(const ChannelNorm& norm, const float* scale, const float* shift, const float* stats, float* factor,
                  float* offset);
void group_affine_back(const ChannelNorm& norm, const float* x, const float* scale, const float* stats,
                       const float* dfactor, const float* doffset, float* dx, float* dscale, float* dshift);

/// sums (c,) over all pixels.
void channel_sum(const float* x, int64_t pixels, int64_t c, float* sums);

}  // namespace mflux
