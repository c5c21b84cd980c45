#include "compute/gemm.h"
#include "operations/ops.h"

namespace mflux {
namespace {

struct LinearOptions {
  Activation activation;
  bool biased, residual;

  bool operator==(const LinearOptions&) const = default;
};

/// x (m, k), weight (n, k), [bias (n,)], [residual (m, n)] -> (m, n).
class Linear : public Operation<Linear, LinearOptions> {
 public:
  static constexpr const char* NAME = "mflux::Linear";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape.back() = inputs[1].shape(0);
    return {shape};
  }

  /// The pre-activation is computed again: it is cheaper to keep x alone.
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    const mx::array &x = primals[0], &weight = primals[1];
    const int k = x.shape(-1), n = weight.shape(0);
    mx::array dz = cotangents[0];
    if (options_.activation != Activation::none) {
      const auto bias = options_.biased ? std::optional(primals[2]) : std::nullopt;
      const mx::array z = linear(x, weight, bias, Activation::none, std::nullopt);
      const auto pair = mx::vjp([this](const Arrays& in) { return Arrays{activate(in[0], options_.activation)}; },
                                Arrays{z}, Arrays{dz});
      dz = pair.second[0];
    }
    Arrays wanted;
    for (int argument : argnums) {
      if (argument == 0) {
        wanted.push_back(product(dz, mx::transpose(weight)));
      } else if (argument == 1) {
        const mx::array rows = mx::reshape(dz, {-1, n});
        wanted.push_back(product(mx::transpose(rows), mx::transpose(mx::reshape(x, {-1, k}))));
      } else if (argument == 2 && options_.biased) {
        wanted.push_back(channel_sum(dz));
      } else {
        wanted.push_back(cotangents[0]);
      }
    }
    return wanted;
  }

 protected:
  /// a @ b.T of arrays in any order in memory.
  static mx::array product(const mx::array& a, const mx::array& b) {
    return linear(a, b, std::nullopt, Activation::none, std::nullopt);
  }

  Work bind(const Arrays& inputs) override {
    const auto &x = inputs[0], &weight = inputs[1];
    const int64_t k = x.shape(-1), n = weight.shape(0);
    int64_t m = 1;
    for (size_t i = 0; i + 1 < x.ndim(); i++) {
      m *= x.shape(i);
    }
    return [=, o = options_](auto& in, auto& out) {
      const Epilogue last{.bias = o.biased ? in[2] : nullptr,
                          .activation = o.activation,
                          .residual = o.residual ? in[2 + o.biased] : nullptr};
      gemm({in[0], k, 1}, {in[1], 1, k}, out[0], m, n, k, last);
    };
  }
};

}  // namespace

mx::array linear(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias,
                 Activation activation, const std::optional<mx::array>& residual) {
  require(x.ndim() > 0 && weight.ndim() == 2 && x.shape(-1) == weight.shape(1),
          "linear: x must be (..., k), weights (n, k)");
  mx::Shape result = x.shape();
  result.back() = weight.shape(0);
  require((!bias || bias->shape() == mx::Shape{weight.shape(0)}) && (!residual || residual->shape() == result),
          "linear: the bias must be (n,), the residual as the result");
  Arrays inputs{ready(x), ready(weight)};
  append(inputs, {bias, residual});
  return Linear({activation, bias.has_value(), residual.has_value()}).apply(inputs)[0];
}

}  // namespace mflux
