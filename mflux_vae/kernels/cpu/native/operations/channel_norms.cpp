#include "compute/channel_norms.h"
#include "operations/ops.h"

namespace mflux {
namespace {

mx::Shape stats_shape(const ChannelNorm& norm) { return {2, int(norm.batch), int(norm.groups)}; }

/// x, scale, shift, stats, dy -> dx, dscale, dshift.
class GroupNormBack : public Operation<GroupNormBack, ChannelNorm> {
 public:
  static constexpr const char* NAME = "mflux::GroupNormBack";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape(), inputs[1].shape(), inputs[2].shape()};
  }

 protected:
  Work bind(const Arrays&) override {
    return [norm = options_](auto& in, auto& out) {
      group_norm_back(norm, in[0], in[1], in[2], in[3], in[4], out[0], out[1], out[2]);
    };
  }
};

/// x, scale, shift -> y, stats.
class GroupNorm : public Operation<GroupNorm, ChannelNorm> {
 public:
  static constexpr const char* NAME = "mflux::GroupNorm";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape(), stats_shape(options_)}; }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    const Arrays inputs{primals[0], primals[1], primals[2], outputs[1], ready(cotangents[0])};
    return select(GroupNormBack(options_, stream()).apply(inputs), argnums);
  }

 protected:
  Work bind(const Arrays&) override {
    return [norm = options_](auto& in, auto& out) {
      group_statistics(norm, in[0], out[1]);
      group_norm(norm, in[0], in[1], in[2], out[1], out[0]);
    };
  }
};

/// x, scale, stats, dfactor, doffset -> dx, dscale, dshift.
class GroupAffineBack : public Operation<GroupAffineBack, ChannelNorm> {
 public:
  static constexpr const char* NAME = "mflux::GroupAffineBack";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape(), inputs[1].shape(), inputs[1].shape()};
  }

 protected:
  Work bind(const Arrays&) override {
    return [norm = options_](auto& in, auto& out) {
      group_affine_back(norm, in[0], in[1], in[2], in[3], in[4], out[0], out[1], out[2]);
    };
  }
};

/// x, scale, shift -> factor, offset, stats.
class GroupAffine : public Operation<GroupAffine, ChannelNorm> {
 public:
  static constexpr const char* NAME = "mflux::GroupAffine";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    return {{int(options_.batch), int(options_.c)}, {int(options_.batch), int(options_.c)}, stats_shape(options_)};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    const Arrays inputs{primals[0], primals[1], outputs[2], ready(cotangents[0]), ready(cotangents[1])};
    return select(GroupAffineBack(options_, stream()).apply(inputs), argnums);
  }

 protected:
  Work bind(const Arrays&) override {
    return [norm = options_](auto& in, auto& out) {
      group_statistics(norm, in[0], out[2]);
      group_affine(norm, in[1], in[2], out[2], out[0], out[1]);
    };
  }
};

/// Sums over all axes but the last.
class ChannelSum : public Operation<ChannelSum, std::monostate> {
 public:
  static constexpr const char* NAME = "mflux::ChannelSum";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {{inputs[0].shape(-1)}}; }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>&, const Arrays&) override {
    return {mx::broadcast_to(cotangents[0], primals[0].shape())};
  }

 protected:
  Work bind(const Arrays& inputs) override {
    const int64_t c = inputs[0].shape(-1), pixels = inputs[0].size() / std::max<int64_t>(c, 1);
    return [=](auto& in, auto& out) { mflux::channel_sum(in[0], pixels, c, out[0]); };
  }
};

ChannelNorm describe(const mx::array& x, int groups, const mx::array& scale, const mx::array& shift, float eps,
                     Activation activation, float slope) {
  require(x.ndim() >= 2, "group_norm: x needs a batch axis and a channel axis");
  const int c = x.shape(-1);
  require(groups > 0 && c % groups == 0, "group_norm: the number of groups does not divide the number of channels");
  require(scale.shape() == mx::Shape{c} && shift.shape() == mx::Shape{c},
          "group_norm: scale and shift need one number per channel");
  const int64_t batch = x.shape(0), per_image = batch && c ? int64_t(x.size()) / (batch * c) : 0;
  return {.batch = batch, .pixels = per_image, .c = c, .groups = groups, .activation = activation, .slope = slope, .eps = eps};
}

}  // namespace

mx::array group_norm(const mx::array& x, int groups, const mx::array& scale, const mx::array& shift, float eps,
                     Activation activation, float slope) {
  const ChannelNorm norm = describe(x, groups, scale, shift, eps, activation, slope);
  return GroupNorm(norm).apply({ready(x), ready(scale), ready(shift)})[0];
}

std::pair<mx::array, mx::array> group_norm_affine(const mx::array& x, int groups, const mx::array& scale,
                                                  const mx::array& shift, float eps) {
  const ChannelNorm norm = describe(x, groups, scale, shift, eps, Activation::none, 0);
  const Arrays all = GroupAffine(norm).apply({ready(x), ready(scale), ready(shift)});
  return {all[0], all[1]};
}

std::tuple<mx::array, mx::array, mx::array> batch_norm(const mx::array& x, const mx::array& scale,
                                                       const mx::array& shift, float eps, Activation activation,
                                                       float slope) {
  const int c = x.ndim() ? x.shape(-1) : 0;
  const mx::array flat = mx::reshape(x, {1, c ? int(x.size() / c) : 0, c});
  const ChannelNorm norm = describe(flat, std::max(c, 1), scale, shift, eps, activation, slope);
  const Arrays all = GroupNorm(norm).apply({ready(flat), ready(scale), ready(shift)});
  const mx::array stats = mx::stop_gradient(mx::reshape(all[1], {2, c}));
  return {mx::reshape(all[0], x.shape()), mx::take(stats, 0, 0), mx::take(stats, 1, 0)};
}

mx::array channel_sum(const mx::array& x) { return ChannelSum(std::monostate{}).apply({ready(x)})[0]; }

}  // namespace mflux
