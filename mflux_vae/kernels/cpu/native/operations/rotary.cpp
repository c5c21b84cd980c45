#include "operations/ops.h"

namespace mflux {
namespace {

constexpr int64_t GRAIN = 8192;

/// x (batch, positions, heads, width), cos and sin (positions, width) or (batch, positions, width).
class Rotary : public CpuPrimitive {
 public:
  Rotary(mx::Stream s, bool inverse) : CpuPrimitive(s), inverse_(inverse) {}

  const char* name() const override { return "mflux::Rotary"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return inverse_ == static_cast<const Rotary&>(other).inverse_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

  Arrays apply(const Arrays& inputs) override {
    return {mx::array(inputs[0].shape(), mx::float32, std::make_shared<Rotary>(stream(), inverse_), inputs)};
  }

  /// Of x: the transpose of the rotation, which is its inverse.
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    const mx::array dy = ready(cotangents[0]);
    Arrays wanted;
    for (int argument : argnums) {
      if (argument == 0) {
        wanted.push_back(Rotary(stream(), !inverse_).apply({dy, primals[1], primals[2]})[0]);
        continue;
      }
      mx::array factor = primals[0], gradient = dy;
      if (argument == 2) {
        (inverse_ ? gradient : factor) = swapped(inverse_ ? gradient : factor);
      }
      const mx::array product = mx::sum(mx::multiply(gradient, factor), 2);
      wanted.push_back(primals[argument].ndim() == 2 ? mx::sum(product, 0) : product);
    }
    return wanted;
  }

 protected:
  static mx::array swapped(const mx::array& x) {
    mx::Shape pairs = x.shape();
    pairs.back() /= 2;
    pairs.push_back(2);
    const mx::array order({1, 0});
    return mx::reshape(mx::take(mx::reshape(x, pairs), order, -1), x.shape());
  }

  Work bind(const Arrays& inputs) override {
    const mx::array& x = inputs[0];
    const int64_t tokens = int64_t(x.shape(0)) * x.shape(1), positions = x.shape(1), heads = x.shape(2), width = x.shape(3);
    const bool shared = inputs[1].ndim() == 2;
    return [=, inverse = inverse_](auto& in, auto& out) {
      parallel_for(tokens, 1 + GRAIN / (heads * width), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; token++) {
          const int64_t at = token * heads * width, angle = (shared ? token % positions : token) * width;
          kernels()->rotate(in[0] + at, in[1] + angle, in[2] + angle, inverse, out[0] + at, heads, width);
        }
      });
    };
  }

 private:
  bool inverse_;
};

}  // namespace

mx::array rotary(const mx::array& x, const mx::array& cos, const mx::array& sin) {
  if (x.ndim() != 4 || x.shape(3) % 2) {
    throw std::invalid_argument("rotary: x must be (batch, positions, heads, width) with an even width");
  }
  Arrays inputs{ready(x)};
  for (const mx::array& angle : {cos, sin}) {
    const bool shared = angle.ndim() == 3 || (angle.ndim() == 4 && angle.shape(0) == 1);
    if (angle.ndim() < 3 || angle.ndim() > 4 || angle.shape(-2) != 1) {
      throw std::invalid_argument("rotary: angles must be (positions, 1, width) or (batch, positions, 1, width)");
    }
    const mx::Shape last(angle.shape().end() - 3, angle.shape().end());
    const mx::array flat = mx::squeeze(shared ? mx::reshape(angle, last) : angle, -2);
    const mx::Shape full{x.shape(1), x.shape(3)}, each{x.shape(0), x.shape(1), x.shape(3)};
    inputs.push_back(ready(mx::broadcast_to(flat, shared ? full : each)));
  }
  if (inputs[1].ndim() != inputs[2].ndim()) {
    throw std::invalid_argument("rotary: cosine and sine have different shapes");
  }
  return Rotary(mx::default_stream(mx::Device::cpu), false).apply(inputs)[0];
}

}  // namespace mflux
