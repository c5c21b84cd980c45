#include "compute/gemm.h"
#include "operations/ops.h"

namespace mflux {
namespace {

struct LinearOptions {
  bool biased = false;
  bool x_turned = false, weight_turned = false;  // x is (k, m), weight is (k, n)

  bool operator==(const LinearOptions&) const = default;
};

/// x (..., k), weight (n, k), [bias (n,)] -> (..., n).
class Linear : public Operation<Linear, LinearOptions> {
 public:
  static constexpr const char* NAME = "mflux::Linear";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const mx::Shape& x = inputs[0].shape();
    mx::Shape shape = options_.x_turned ? mx::Shape{x[1], 0} : x;
    shape.back() = inputs[1].shape(options_.weight_turned);
    return {shape};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    const mx::array &x = primals[0], &weight = primals[1];
    const mx::array dy = ready(cotangents[0]);
    const bool x_turned = options_.x_turned, weight_turned = options_.weight_turned;
    const auto rows = [](const mx::array& of) {
      return mx::reshape(of, {int(of.size() / std::max(of.shape(-1), 1)), of.shape(-1)});
    };
    Arrays wanted;
    for (int argument : argnums) {
      if (argument == 0) {
        wanted.push_back(x_turned ? product(weight, dy, !weight_turned, false)
                                  : product(dy, weight, false, !weight_turned));
      } else if (argument == 1) {
        wanted.push_back(weight_turned ? product(rows(x), rows(dy), !x_turned, true)
                                       : product(rows(dy), rows(x), true, !x_turned));
      } else {
        wanted.push_back(channel_sum(dy));
      }
    }
    return wanted;
  }

 protected:
  mx::array product(const mx::array& x, const mx::array& weight, bool x_turned, bool weight_turned) {
    return Linear({.x_turned = x_turned, .weight_turned = weight_turned}, stream()).apply({x, weight})[0];
  }

  Work bind(const Arrays& inputs) override {
    const auto &x = inputs[0], &weight = inputs[1];
    const LinearOptions o = options_;
    const int64_t k = weight.shape(!o.weight_turned), n = weight.shape(o.weight_turned);
    int64_t m = 1;
    for (size_t i = o.x_turned; i + !o.x_turned < x.ndim(); i++) {
      m *= x.shape(i);
    }
    return [=](auto& in, auto& out) {
      const Epilogue last{.bias = o.biased ? in[2] : nullptr};
      const Matrix left = o.x_turned ? Matrix{in[0], 1, m} : Matrix{in[0], k, 1};
      const Matrix right = o.weight_turned ? Matrix{in[1], n, 1} : Matrix{in[1], 1, k};
      gemm(left, right, out[0], m, n, k, last);
    };
  }
};

}  // namespace

mx::array linear(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias) {
  require(x.ndim() > 0 && weight.ndim() == 2 && x.shape(-1) == weight.shape(1),
          "linear: x must be (..., k), weights (n, k)");
  require(!bias || bias->shape() == mx::Shape{weight.shape(0)}, "linear: the bias must be (n,)");
  Arrays inputs{ready(x), ready(weight)};
  append(inputs, {bias});
  return Linear({.biased = bias.has_value()}).apply(inputs)[0];
}

}  // namespace mflux
