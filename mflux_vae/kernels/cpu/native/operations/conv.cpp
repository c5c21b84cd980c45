#include "compute/conv.h"
#include "operations/ops.h"

namespace mflux {
namespace {

/// Scale and shift are both (batch, c), or both missing.
void require_pair(const mx::array& x, const std::optional<mx::array>& scale, const std::optional<mx::array>& shift) {
  require(x.ndim() >= 2 && scale.has_value() == shift.has_value(), "scale and shift are given together");
  const mx::Shape pair{x.shape(0), x.shape(-1)};
  require(!scale || (scale->shape() == pair && shift->shape() == pair), "scale and shift must be (batch, c)");
}

/// x (batch, ..., c), [scale, shift (batch, c)] -> silu(x * scale + shift).
struct AffineOptions {
  bool affine, silu;

  bool operator==(const AffineOptions&) const = default;
};

class AffineBack : public Operation<AffineBack, AffineOptions> {
 public:
  static constexpr const char* NAME = "mflux::AffineBack";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes{inputs[0].shape()};
    if (options_.affine) {
      shapes.insert(shapes.end(), 2, inputs[2].shape());
    }
    return shapes;
  }

 protected:
  Work bind(const Arrays& inputs) override {
    const int64_t c = inputs[0].shape(-1), batch = inputs[0].shape(0), count = inputs[0].size() / (batch * c);
    return [=, o = options_](auto& in, auto& out) {
      std::vector<float> sums(2 * c);
      for (int64_t image = 0; image < batch; image++) {
        const int64_t at = image * count * c;
        const float *scale = o.affine ? in[2] + image * c : nullptr, *shift = o.affine ? in[3] + image * c : nullptr;
        parallel_sum(count, 1 + GRAIN / c, 2 * c, sums.data(), [&](int64_t begin, int64_t end, float* partial) {
          kernels()->affine_back(in[0] + at + begin * c, scale, shift, o.silu, in[1] + at + begin * c,
                                 out[0] + at + begin * c, o.affine ? partial : nullptr,
                                 o.affine ? partial + c : nullptr, end - begin, c);
        });
        if (o.affine) {
          std::copy_n(sums.data(), c, out[1] + image * c);
          std::copy_n(sums.data() + c, c, out[2] + image * c);
        }
      }
    };
  }
};

class Affine : public Operation<Affine, AffineOptions> {
 public:
  static constexpr const char* NAME = "mflux::Affine";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    Arrays inputs{primals[0], ready(cotangents[0])};
    inputs.insert(inputs.end(), primals.begin() + 1, primals.end());
    return select(AffineBack(options_, stream()).apply(inputs), argnums);
  }

 protected:
  Work bind(const Arrays& inputs) override {
    const int64_t c = inputs[0].shape(-1), batch = inputs[0].shape(0), count = inputs[0].size() / (batch * c);
    return [=, o = options_](auto& in, auto& out) {
      for (int64_t image = 0; image < batch; image++) {
        const int64_t at = image * count * c;
        const float *scale = o.affine ? in[1] + image * c : nullptr, *shift = o.affine ? in[2] + image * c : nullptr;
        parallel_for(count, 1 + GRAIN / c, [&](int64_t begin, int64_t end) {
          kernels()->affine(in[0] + at + begin * c, scale, shift, o.silu, out[0] + at + begin * c, end - begin, c);
        });
      }
    };
  }
};

/// The convolution that computes the input gradient of one with stride 1, and the other way round.
Conv turned(Conv conv) {
  std::swap(conv.height, conv.out_height);
  std::swap(conv.width, conv.out_width);
  std::swap(conv.c, conv.o);
  conv.top = conv.kh - 1 - conv.top;
  conv.left = conv.kw - 1 - conv.left;
  conv.turned = !conv.turned;
  return conv;
}

/// x, dy -> dweight.
class WeightGradient : public Operation<WeightGradient, Conv> {
 public:
  static constexpr const char* NAME = "mflux::WeightGradient";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    return {{int(options_.o), int(options_.kh), int(options_.kw), int(options_.c)}};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override;

 protected:
  Work bind(const Arrays&) override {
    return [conv = options_](auto& in, auto& out) { weight_gradient(conv, in[0], in[1], out[0]); };
  }
};

/// weight, dy, [bias] -> dx of a convolution, + bias.
class InputGradient : public Operation<InputGradient, Conv> {
 public:
  static constexpr const char* NAME = "mflux::InputGradient";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    return {{int(options_.batch), int(options_.height), int(options_.width), int(options_.c)}};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override;

 protected:
  Work bind(const Arrays&) override {
    return [conv = options_](auto& in, auto& out) {
      input_gradient(conv, in[0], in[1], conv.biased ? in[2] : nullptr, out[0]);
    };
  }
};

/// (batch, 2 h, 2 w, c) -> (batch, h, w, c): the gradient of doubled pixels.
class SumOfFour : public Operation<SumOfFour, std::monostate> {
 public:
  static constexpr const char* NAME = "mflux::SumOfFour";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const auto& x = inputs[0];
    return {{x.shape(0), x.shape(1) / 2, x.shape(2) / 2, x.shape(3)}};
  }

  Arrays vjp(const Arrays&, const Arrays& cotangents, const std::vector<int>&, const Arrays&) override {
    return {ready(mx::repeat(mx::repeat(cotangents[0], 2, 1), 2, 2))};
  }

 protected:
  Work bind(const Arrays& inputs) override {
    const int64_t lines = inputs[0].shape(0) * int64_t(inputs[0].shape(1) / 2), width = inputs[0].shape(2) / 2,
                  c = inputs[0].shape(3);
    return [=](auto& in, auto& out) {
      parallel_for(lines, 1 + GRAIN / (4 * width * c + 1), [&](int64_t begin, int64_t end) {
        for (int64_t line = begin; line < end; line++) {
          for (int64_t column = 0; column < width; column++) {
            const float *above = in[0] + (4 * line * width + 2 * column) * c, *below = above + 2 * width * c;
            float* to = out[0] + (line * width + column) * c;
#pragma GCC ivdep
            for (int64_t i = 0; i < c; i++) {
              to[i] = (above[i] + above[c + i]) + (below[i] + below[c + i]);
            }
          }
        }
      });
    };
  }
};

/// x, weight, [bias], [residual], [scale, shift] -> y.
class Convolution : public Operation<Convolution, Conv> {
 public:
  static constexpr const char* NAME = "mflux::Convolution";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    return {{int(options_.batch), int(options_.out_height), int(options_.out_width), int(options_.o)}};
  }

  /// Gradient of the image that the kernel moves over.
  mx::array input_gradient_of(const mx::array& weight, const mx::array& dy) {
    Conv back = options_.plain();
    back.height = options_.seen_height();
    back.width = options_.seen_width();
    if (back.stride > 1) {
      return InputGradient(back, stream()).apply({weight, dy})[0];
    }
    return Convolution(turned(back), stream()).apply({dy, weight})[0];
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    if (options_.turned) {  // inputs are dy and weights of the convolution whose gradient this is: linear in both
      const mx::array d = ready(cotangents[0]);
      const Arrays both{Convolution(turned(options_), stream()).apply({d, primals[1]})[0],
                        WeightGradient(turned(options_), stream()).apply({d, primals[0]})[0]};
      return select(both, argnums);
    }
    const Conv& conv = options_;
    const mx::array dy = ready(cotangents[0]);
    const int affine_at = 2 + conv.biased + conv.residual;
    const AffineOptions options{conv.affine, conv.silu};
    Arrays before{primals[0]};
    before.insert(before.end(), primals.begin() + affine_at, primals.end());
    const auto needs = [&](auto test) { return std::any_of(argnums.begin(), argnums.end(), test); };
    Arrays through;  // gradients of x, scale and shift
    if (needs([&](int i) { return i == 0 || i >= affine_at; })) {
      mx::array du = input_gradient_of(primals[1], dy);
      if (conv.doubled) {
        du = SumOfFour(std::monostate{}, stream()).apply({du})[0];
      }
      if (conv.affine || conv.silu) {
        Arrays inputs{before[0], du};
        inputs.insert(inputs.end(), before.begin() + 1, before.end());
        through = AffineBack(options, stream()).apply(inputs);
      } else {
        through = {du};
      }
    }
    Arrays wanted;
    for (int argument : argnums) {
      if (argument == 1) {
        mx::array u = before[0];
        if (conv.affine || conv.silu) {
          u = Affine(options, stream()).apply(before)[0];
        }
        Conv seen = conv.plain();
        seen.doubled = conv.doubled;
        wanted.push_back(WeightGradient(seen, stream()).apply({u, dy})[0]);
      } else if (argument == 2 && conv.biased) {
        wanted.push_back(channel_sum(dy));
      } else if (argument == 2 + conv.biased && conv.residual) {
        wanted.push_back(dy);
      } else {
        wanted.push_back(through[argument == 0 ? 0 : argument - affine_at + 1]);
      }
    }
    return wanted;
  }

 protected:
  Work bind(const Arrays&) override {
    return [conv = options_](auto& in, auto& out) {
      const float* const* more = in.data() + 2;
      const auto next = [&](bool given) { return given ? *more++ : nullptr; };
      const ConvArrays arrays{.x = in[0], .weight = in[1], .bias = next(conv.biased), .residual = next(conv.residual),
                              .scale = next(conv.affine), .shift = next(conv.affine)};
      convolve(conv, arrays, out[0]);
    };
  }
};

/// Linear in x and dy, too.
Arrays WeightGradient::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                           const Arrays&) {
  const mx::array d = ready(cotangents[0]);
  Convolution forward(options_, stream());
  mx::array dx = forward.input_gradient_of(d, primals[1]);
  if (options_.doubled) {
    dx = SumOfFour(std::monostate{}, stream()).apply({dx})[0];
  }
  return select({dx, forward.apply({primals[0], d})[0]}, argnums);
}

/// The operation is linear in weights and dy: gradients are the convolution itself, and its weight gradient.
Arrays InputGradient::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                          const Arrays&) {
  const mx::array d = ready(cotangents[0]);
  const Conv conv = options_.plain();
  return select({WeightGradient(conv, stream()).apply({d, primals[1]})[0],
                 Convolution(conv, stream()).apply({d, primals[0]})[0], channel_sum(d)}, argnums);
}

}  // namespace

mx::array conv_transpose2d(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias, int stride,
                           std::array<int, 2> padding, std::array<int, 2> size) {
  require(x.ndim() == 4 && weight.ndim() == 4 && x.shape(3) == weight.shape(3) && stride > 0 && padding[0] >= 0 && padding[1] >= 0,
          "conv_transpose2d: x must be (batch, h, w, c), weights (o, kh, kw, c)");
  const Conv conv{.batch = x.shape(0), .height = size[0], .width = size[1], .c = weight.shape(0), .o = x.shape(3),
                  .kh = weight.shape(1), .kw = weight.shape(2), .stride = stride, .top = padding[0], .left = padding[1],
                  .out_height = x.shape(1), .out_width = x.shape(2), .biased = bias.has_value()};
  require(size[0] >= 0 && size[1] >= 0 && (!bias || bias->shape() == mx::Shape{weight.shape(0)}),
          "conv_transpose2d: negative size, or a bias without one number per output channel");
  Arrays inputs{ready(mx::transpose(weight, {3, 1, 2, 0})), ready(x)};
  append(inputs, {bias});
  return InputGradient(conv).apply(inputs)[0];
}

mx::array conv2d(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias,
                 const std::optional<mx::array>& residual, const std::optional<mx::array>& scale,
                 const std::optional<mx::array>& shift, bool silu, bool doubled, int stride, std::array<int, 4> padding) {
  require(x.ndim() == 4 && weight.ndim() == 4 && weight.shape(3) == x.shape(3) && x.shape(3) > 0,
          "conv2d: x must be (batch, h, w, c), weights (o, kh, kw, c)");
  require(stride > 0 && weight.shape(1) > 0 && weight.shape(2) > 0 && *std::min_element(padding.begin(), padding.end()) >= 0,
          "conv2d: strides and sizes of the kernel must be positive, padding must not be negative");
  Conv conv{.batch = x.shape(0), .height = x.shape(1), .width = x.shape(2), .c = x.shape(3),
            .o = weight.shape(0), .kh = weight.shape(1), .kw = weight.shape(2), .stride = stride,
            .top = padding[0], .left = padding[2], .out_height = 0, .out_width = 0, .affine = scale.has_value(),
            .silu = silu, .doubled = doubled, .biased = bias.has_value(), .residual = residual.has_value()};
  conv.out_height = (conv.seen_height() + padding[0] + padding[1] - conv.kh) / stride + 1;
  conv.out_width = (conv.seen_width() + padding[2] + padding[3] - conv.kw) / stride + 1;
  require(conv.seen_height() + padding[0] + padding[1] >= conv.kh && conv.seen_width() + padding[2] + padding[3] >= conv.kw,
          "conv2d: the kernel is larger than the padded image");
  const mx::Shape result{int(conv.batch), int(conv.out_height), int(conv.out_width), int(conv.o)};
  require((!bias || bias->shape() == mx::Shape{int(conv.o)}) && (!residual || residual->shape() == result),
          "conv2d: the bias must be (o,), the residual as the result");
  require_pair(x, scale, shift);
  Arrays inputs{ready(x), ready(weight)};
  append(inputs, {bias, residual, scale, shift});
  return Convolution(conv).apply(inputs)[0];
}

mx::array affine(const mx::array& x, const std::optional<mx::array>& scale, const std::optional<mx::array>& shift,
                 bool silu) {
  require_pair(x, scale, shift);
  Arrays inputs{ready(x)};
  append(inputs, {scale, shift});
  return Affine({scale.has_value(), silu}).apply(inputs)[0];
}

}  // namespace mflux
