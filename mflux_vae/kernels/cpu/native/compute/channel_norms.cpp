#include "compute/channel_norms.h"

#include <cmath>
#include <vector>

#include "compute/pool.h"

namespace mflux {
namespace {

using Values = std::vector<float>;

int64_t grain(const ChannelNorm& norm) { return 1 + GRAIN / norm.c; }

/// Call `f(group, begin, end, channel)` for each sample and group: its part of an array (batch, c), and its first channel.
template <class F>
void each_group(const ChannelNorm& norm, F&& f) {
  const int64_t width = norm.c / norm.groups;
  for (int64_t i = 0; i < norm.batch * norm.groups; i++) {
    f(i, i * width, i * width + width, (i % norm.groups) * width);
  }
}

/// Mean, and scale / sqrt(variance + eps), of each sample and channel: (batch, c) each.
void spread(const ChannelNorm& norm, const float* scale, const float* stats, Values& mean, Values& factor) {
  mean.resize(norm.batch * norm.c);
  factor.resize(norm.batch * norm.c);
  const float* variance = stats + norm.batch * norm.groups;
  each_group(norm, [&](int64_t group, int64_t begin, int64_t end, int64_t channel) {
    const double rstd = 1 / std::sqrt(double(variance[group]) + norm.eps);
    for (int64_t i = begin; i < end; i++, channel++) {
      mean[i] = stats[group];
      factor[i] = float(rstd * scale[channel]);
    }
  });
}

/// dx = dz * factor + (x - mean) * slope + offset, all but x and dz (batch, c).
void gradient(const ChannelNorm& norm, const float* x, const Values& mean, const float* factor, const Values& slope,
              const Values& offset, const float* dz, float* dx) {
  const int64_t c = norm.c;
  parallel_for(norm.batch * norm.pixels, grain(norm), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / norm.pixels, last = std::min(end, (image + 1) * norm.pixels);
      kernels()->center_dx(x + begin * c, mean.data() + image * c, factor ? factor + image * c : nullptr,
                           slope.data() + image * c, offset.data() + image * c, dz ? dz + begin * c : nullptr,
                           dx + begin * c, last - begin, c);
      begin = last;
    }
  });
}

}  // namespace

void group_statistics(const ChannelNorm& norm, const float* x, float* stats) {
  const int64_t c = norm.c, groups = norm.batch * norm.groups;
  const double count = double(norm.pixels) * double(c / norm.groups);
  Values sums(norm.batch * c), mean(norm.batch * c);
  const auto reduce = [&](float* to) {
    each_group(norm, [&](int64_t group, int64_t begin, int64_t end, int64_t) {
      double total = 0;
      for (int64_t i = begin; i < end; i++) {
        total += sums[i];
      }
      to[group] = float(total / count);
    });
  };
  parallel_sums(norm.batch, norm.pixels, grain(norm), c, sums.data(),
                [&](int64_t image, int64_t begin, int64_t end, float* partial) {
                  kernels()->channel_sums(x + (image * norm.pixels + begin) * c, end - begin, c, partial);
                });
  reduce(stats);
  each_group(norm, [&](int64_t group, int64_t begin, int64_t end, int64_t) {
    std::fill(mean.begin() + begin, mean.begin() + end, stats[group]);
  });
  parallel_sums(norm.batch, norm.pixels, grain(norm), c, sums.data(),
                [&](int64_t image, int64_t begin, int64_t end, float* partial) {
                  kernels()->channel_squares(x + (image * norm.pixels + begin) * c, mean.data() + image * c,
                                             end - begin, c, partial);
                });
  reduce(stats + groups);
}

void group_norm(const ChannelNorm& norm, const float* x, const float* scale, const float* shift, const float* stats,
                float* y) {
  const int64_t c = norm.c;
  Values mean, factor;
  spread(norm, scale, stats, mean, factor);
  parallel_for(norm.batch * norm.pixels, grain(norm), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / norm.pixels, last = std::min(end, (image + 1) * norm.pixels);
      kernels()->center_scale(norm.activation, norm.slope, x + begin * c, mean.data() + image * c,
                              factor.data() + image * c, shift, y + begin * c, last - begin, c);
      begin = last;
    }
  });
}

void group_norm_back(const ChannelNorm& norm, const float* x, const float* scale, const float* shift,
                     const float* stats, const float* dy, float* dx, float* dscale, float* dshift) {
  const int64_t c = norm.c, groups = norm.batch * norm.groups;
  const double count = double(norm.pixels) * double(c / norm.groups);
  Values mean, factor, sums(norm.batch * 2 * c), slope(norm.batch * c), offset(norm.batch * c);
  spread(norm, scale, stats, mean, factor);
  parallel_sums(norm.batch, norm.pixels, grain(norm), 2 * c, sums.data(),
                [&](int64_t image, int64_t begin, int64_t end, float* partial) {
                  const int64_t at = (image * norm.pixels + begin) * c;
                  kernels()->center_scale_back(norm.activation, norm.slope, x + at, mean.data() + image * c,
                                               factor.data() + image * c, shift, dy + at, dx + at, partial,
                                               end - begin, c);
                });
  // of dz and dz * (x - mean), for each sample and channel
  const auto total = [&](int64_t i) { return double(sums[i / c * 2 * c + i % c]); };
  const auto product = [&](int64_t i) { return double(sums[i / c * 2 * c + c + i % c]); };
  const auto rstd = [&](int64_t group) { return 1 / std::sqrt(double(stats[groups + group]) + norm.eps); };
  std::vector<double> of_scale(c), of_shift(c);
  each_group(norm, [&](int64_t group, int64_t begin, int64_t end, int64_t channel) {
    double a = 0, b = 0;
    for (int64_t i = begin, j = channel; i < end; i++, j++) {
      of_scale[j] += product(i) * rstd(group);
      of_shift[j] += total(i);
      a += total(i) * scale[j];
      b += product(i) * scale[j];
    }
    const double r = rstd(group);
    std::fill(slope.begin() + begin, slope.begin() + end, float(-b * r * r * r / count));
    std::fill(offset.begin() + begin, offset.begin() + end, float(-a * r / count));
  });
  std::copy(of_scale.begin(), of_scale.end(), dscale);
  std::copy(of_shift.begin(), of_shift.end(), dshift);
  gradient(norm, x, mean, factor.data(), slope, offset, norm.activation == Activation::none ? dy : dx, dx);
}

void group_affine(const ChannelNorm& norm, const float* scale, const float* shift, const float* stats, float* factor,
                  float* offset) {
  Values mean, factors;
  spread(norm, scale, stats, mean, factors);
  for (int64_t i = 0; i < norm.batch * norm.c; i++) {
    factor[i] = factors[i];
    offset[i] = float(shift[i % norm.c] - double(mean[i]) * factors[i]);
  }
}

void group_affine_back(const ChannelNorm& norm, const float* x, const float* scale, const float* stats,
                       const float* dfactor, const float* doffset, float* dx, float* dscale, float* dshift) {
  const int64_t c = norm.c, groups = norm.batch * norm.groups;
  const double count = double(norm.pixels) * double(c / norm.groups);
  Values mean, factor, slope(norm.batch * c), offset(norm.batch * c);
  spread(norm, scale, stats, mean, factor);
  std::vector<double> of_scale(c), of_shift(c);
  each_group(norm, [&](int64_t group, int64_t begin, int64_t end, int64_t channel) {
    const double r = 1 / std::sqrt(double(stats[groups + group]) + norm.eps);
    double of_rstd = 0, of_mean = 0;
    for (int64_t i = begin, j = channel; i < end; i++, j++) {
      const double d = double(dfactor[i]) - double(mean[i]) * doffset[i];  // the offset contains the factor
      of_scale[j] += d * r;
      of_shift[j] += doffset[i];
      of_rstd += d * scale[j];
      of_mean -= double(doffset[i]) * factor[i];
    }
    std::fill(slope.begin() + begin, slope.begin() + end, float(-of_rstd * r * r * r / count));
    std::fill(offset.begin() + begin, offset.begin() + end, float(of_mean / count));
  });
  std::copy(of_scale.begin(), of_scale.end(), dscale);
  std::copy(of_shift.begin(), of_shift.end(), dshift);
  gradient(norm, x, mean, nullptr, slope, offset, nullptr, dx);
}

void channel_sum(const float* x, int64_t pixels, int64_t c, float* sums) {
  parallel_sum(pixels, 1 + GRAIN / c, c, sums, [&](int64_t begin, int64_t end, float* partial) {
    kernels()->channel_sums(x + begin * c, end - begin, c, partial);
  });
}

}  // namespace mflux
