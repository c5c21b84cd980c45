#include "operations/ops.h"

namespace mflux {
namespace {

struct RotaryOptions {
  bool inverse;

  bool operator==(const RotaryOptions&) const = default;
};

/// x (batch, positions, heads, width), cos and sin (positions, width) or (batch, positions, width).
class Rotary : public Operation<Rotary, RotaryOptions> {
 public:
  static constexpr const char* NAME = "mflux::Rotary";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

  /// Of x: the transpose of the rotation, which is its inverse.
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    const mx::array dy = ready(cotangents[0]);
    Arrays wanted;
    for (int argument : argnums) {
      if (argument == 0) {
        wanted.push_back(Rotary({!options_.inverse}, stream()).apply({dy, primals[1], primals[2]})[0]);
        continue;
      }
      mx::array factor = primals[0], gradient = dy;
      if (argument == 2) {
        mx::array& turned = options_.inverse ? gradient : factor;
        turned = swapped(turned);
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
    return [=, inverse = options_.inverse](auto& in, auto& out) {
      parallel_for(tokens, 1 + GRAIN / (heads * width), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; token++) {
          const int64_t at = token * heads * width, angle = (shared ? token % positions : token) * width;
          kernels()->rotate(in[0] + at, in[1] + angle, in[2] + angle, inverse, out[0] + at, heads, width);
        }
      });
    };
  }
};

}  // namespace

mx::array rotary(const mx::array& x, const mx::array& cos, const mx::array& sin) {
  require(x.ndim() == 4 && x.shape(3) % 2 == 0, "rotary: x must be (batch, positions, heads, width) with an even width");
  Arrays inputs{ready(x)};
  for (const mx::array& angle : {cos, sin}) {
    const bool shared = angle.ndim() == 3 || (angle.ndim() == 4 && angle.shape(0) == 1);
    require((angle.ndim() == 3 || angle.ndim() == 4) && angle.shape(-2) == 1,
            "rotary: angles must be (positions, 1, width) or (batch, positions, 1, width)");
    const mx::Shape last(angle.shape().end() - 3, angle.shape().end());
    const mx::array flat = mx::squeeze(shared ? mx::reshape(angle, last) : angle, -2);
    const mx::Shape full{x.shape(1), x.shape(3)}, each{x.shape(0), x.shape(1), x.shape(3)};
    inputs.push_back(ready(mx::broadcast_to(flat, shared ? full : each)));
  }
  require(inputs[1].ndim() == inputs[2].ndim(), "rotary: cosine and sine have different shapes");
  return Rotary({.inverse = false}).apply(inputs)[0];
}

}  // namespace mflux
