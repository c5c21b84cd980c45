#include "compute/channel_norms.h"
#include "operations/ops.h"

namespace mflux {
namespace {

mx::Stream cpu() { return mx::default_stream(mx::Device::cpu); }

/// The base of the four primitives: their options.
class NormPrimitive : public CpuPrimitive {
 public:
  NormPrimitive(mx::Stream s, ChannelNorm norm) : CpuPrimitive(s), norm_(norm) {}

  bool is_equivalent(const mx::Primitive& other) const override {
    return norm_ == static_cast<const NormPrimitive&>(other).norm_;
  }

 protected:
  template <class P>
  Arrays make(const Arrays& inputs) {
    auto primitive = std::make_shared<P>(stream(), norm_);
    const auto shapes = primitive->output_shapes(inputs);
    return mx::array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32), primitive, inputs);
  }

  mx::Shape stats_shape() const { return {2, int(norm_.batch), int(norm_.groups)}; }

  static Arrays select(const Arrays& all, const std::vector<int>& argnums) {
    Arrays wanted;
    for (int argument : argnums) {
      wanted.push_back(all[argument]);
    }
    return wanted;
  }

  ChannelNorm norm_;
};

/// x, scale, shift, stats, dy -> dx, dscale, dshift.
class GroupNormBack : public NormPrimitive {
 public:
  using NormPrimitive::NormPrimitive;

  const char* name() const override { return "mflux::GroupNormBack"; }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape(), inputs[1].shape(), inputs[2].shape()};
  }

  Arrays apply(const Arrays& inputs) override { return make<GroupNormBack>(inputs); }

 protected:
  Work bind(const Arrays&) override {
    return [norm = norm_](auto& in, auto& out) {
      group_norm_back(norm, in[0], in[1], in[2], in[3], in[4], out[0], out[1], out[2]);
    };
  }
};

/// x, scale, shift -> y, stats.
class GroupNorm : public NormPrimitive {
 public:
  using NormPrimitive::NormPrimitive;

  const char* name() const override { return "mflux::GroupNorm"; }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape(), stats_shape()}; }

  Arrays apply(const Arrays& inputs) override { return make<GroupNorm>(inputs); }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    return select(make<GroupNormBack>({primals[0], primals[1], primals[2], outputs[1], ready(cotangents[0])}), argnums);
  }

 protected:
  Work bind(const Arrays&) override {
    return [norm = norm_](auto& in, auto& out) {
      group_statistics(norm, in[0], out[1]);
      group_norm(norm, in[0], in[1], in[2], out[1], out[0]);
    };
  }
};

/// x, scale, stats, dfactor, doffset -> dx, dscale, dshift.
class GroupAffineBack : public NormPrimitive {
 public:
  using NormPrimitive::NormPrimitive;

  const char* name() const override { return "mflux::GroupAffineBack"; }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape(), inputs[1].shape(), inputs[1].shape()};
  }

  Arrays apply(const Arrays& inputs) override { return make<GroupAffineBack>(inputs); }

 protected:
  Work bind(const Arrays&) override {
    return [norm = norm_](auto& in, auto& out) {
      group_affine_back(norm, in[0], in[1], in[2], in[3], in[4], out[0], out[1], out[2]);
    };
  }
};

/// x, scale, shift -> factor, offset, stats.
class GroupAffine : public NormPrimitive {
 public:
  using NormPrimitive::NormPrimitive;

  const char* name() const override { return "mflux::GroupAffine"; }

  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    return {{int(norm_.batch), int(norm_.c)}, {int(norm_.batch), int(norm_.c)}, stats_shape()};
  }

  Arrays apply(const Arrays& inputs) override { return make<GroupAffine>(inputs); }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    return select(
        make<GroupAffineBack>({primals[0], primals[1], outputs[2], ready(cotangents[0]), ready(cotangents[1])}),
        argnums);
  }

 protected:
  Work bind(const Arrays&) override {
    return [norm = norm_](auto& in, auto& out) {
      group_statistics(norm, in[0], out[2]);
      group_affine(norm, in[1], in[2], out[2], out[0], out[1]);
    };
  }
};

/// Sums over all axes but the last.
class ChannelSum : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;

  const char* name() const override { return "mflux::ChannelSum"; }

  bool is_equivalent(const mx::Primitive&) const override { return true; }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {{inputs[0].shape(-1)}}; }

  Arrays apply(const Arrays& inputs) override { return {channel_sum(inputs[0])}; }

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
  if (x.ndim() < 2) {
    throw std::invalid_argument("group_norm: x needs a batch axis and a channel axis");
  }
  const int c = x.shape(-1);
  if (groups < 1 || c % groups) {
    throw std::invalid_argument("group_norm: the number of groups does not divide the number of channels");
  }
  if (scale.shape() != mx::Shape{c} || shift.shape() != mx::Shape{c}) {
    throw std::invalid_argument("group_norm: scale and shift need one number per channel");
  }
  const int64_t batch = x.shape(0), per_image = batch && c ? int64_t(x.size()) / (batch * c) : 0;
  return {.batch = batch, .pixels = per_image, .c = c, .groups = groups, .activation = activation, .slope = slope, .eps = eps};
}

}  // namespace

mx::array group_norm(const mx::array& x, int groups, const mx::array& scale, const mx::array& shift, float eps,
                     Activation activation, float slope) {
  const ChannelNorm norm = describe(x, groups, scale, shift, eps, activation, slope);
  return GroupNorm(cpu(), norm).apply({ready(x), ready(scale), ready(shift)})[0];
}

std::pair<mx::array, mx::array> group_norm_affine(const mx::array& x, int groups, const mx::array& scale,
                                                  const mx::array& shift, float eps) {
  const ChannelNorm norm = describe(x, groups, scale, shift, eps, Activation::none, 0);
  const Arrays all = GroupAffine(cpu(), norm).apply({ready(x), ready(scale), ready(shift)});
  return {all[0], all[1]};
}

std::tuple<mx::array, mx::array, mx::array> batch_norm(const mx::array& x, const mx::array& scale,
                                                       const mx::array& shift, float eps, Activation activation,
                                                       float slope) {
  const int c = x.ndim() ? x.shape(-1) : 0;
  const mx::array flat = mx::reshape(x, {1, c ? int(x.size() / c) : 0, c});
  const ChannelNorm norm = describe(flat, std::max(c, 1), scale, shift, eps, activation, slope);
  const Arrays all = GroupNorm(cpu(), norm).apply({ready(flat), ready(scale), ready(shift)});
  const mx::array stats = mx::stop_gradient(mx::reshape(all[1], {2, c}));
  return {mx::reshape(all[0], x.shape()), mx::take(stats, 0, 0), mx::take(stats, 1, 0)};
}

mx::array channel_sum(const mx::array& x) {
  const mx::array input = ready(x);
  return mx::array({input.shape(-1)}, mx::float32, std::make_shared<ChannelSum>(cpu()), {input});
}

}  // namespace mflux
