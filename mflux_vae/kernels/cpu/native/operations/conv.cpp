#include "compute/conv.h"
#include "operations/ops.h"

namespace mflux {
namespace {

constexpr int64_t GRAIN = 8192;

/// Scale and shift are both (batch, c), or both missing.
void require_pair(const mx::array& x, const std::optional<mx::array>& scale, const std::optional<mx::array>& shift) {
  require(x.ndim() >= 2 && scale.has_value() == shift.has_value(), "scale and shift are given together");
  const mx::Shape pair{x.shape(0), x.shape(-1)};
  require(!scale || (scale->shape() == pair && shift->shape() == pair), "scale and shift must be (batch, c)");
}

mx::Stream cpu() { return mx::default_stream(mx::Device::cpu); }

/// x (batch, ..., c), [scale, shift (batch, c)] -> silu(x * scale + shift).
struct AffineOptions {
  bool affine, silu;

  bool operator==(const AffineOptions&) const = default;
};

class AffineBack : public CpuPrimitive {
 public:
  AffineBack(mx::Stream s, AffineOptions options) : CpuPrimitive(s), options_(options) {}

  const char* name() const override { return "mflux::AffineBack"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return options_ == static_cast<const AffineBack&>(other).options_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes{inputs[0].shape()};
    if (options_.affine) {
      shapes.insert(shapes.end(), 2, inputs[2].shape());
    }
    return shapes;
  }

  Arrays apply(const Arrays& inputs) override {
    const auto shapes = output_shapes(inputs);
    return mx::array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32),
                                  std::make_shared<AffineBack>(stream(), options_), inputs);
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

 private:
  AffineOptions options_;
};

class Affine : public CpuPrimitive {
 public:
  Affine(mx::Stream s, AffineOptions options) : CpuPrimitive(s), options_(options) {}

  const char* name() const override { return "mflux::Affine"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return options_ == static_cast<const Affine&>(other).options_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

  Arrays apply(const Arrays& inputs) override {
    return {mx::array(inputs[0].shape(), mx::float32, std::make_shared<Affine>(stream(), options_), inputs)};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    Arrays inputs{primals[0], ready(cotangents[0])};
    inputs.insert(inputs.end(), primals.begin() + 1, primals.end());
    const Arrays all = AffineBack(stream(), options_).apply(inputs);
    Arrays wanted;
    for (int argument : argnums) {
      wanted.push_back(all[argument]);
    }
    return wanted;
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

 private:
  AffineOptions options_;
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
class WeightGradient : public CpuPrimitive {
 public:
  WeightGradient(mx::Stream s, Conv conv) : CpuPrimitive(s), conv_(conv) {}

  const char* name() const override { return "mflux::WeightGradient"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return conv_ == static_cast<const WeightGradient&>(other).conv_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    return {{int(conv_.o), int(conv_.kh), int(conv_.kw), int(conv_.c)}};
  }

  Arrays apply(const Arrays& inputs) override {
    return {mx::array(output_shapes(inputs)[0], mx::float32, std::make_shared<WeightGradient>(stream(), conv_), inputs)};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override;

 protected:
  Work bind(const Arrays&) override {
    return [conv = conv_](auto& in, auto& out) { weight_gradient(conv, in[0], in[1], out[0]); };
  }

 private:
  Conv conv_;
};

/// weight, dy, [bias] -> dx of a convolution, + bias.
class InputGradient : public CpuPrimitive {
 public:
  InputGradient(mx::Stream s, Conv conv, bool biased) : CpuPrimitive(s), conv_(conv), biased_(biased) {}

  const char* name() const override { return "mflux::InputGradient"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const InputGradient&>(other);
    return conv_ == o.conv_ && biased_ == o.biased_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    return {{int(conv_.batch), int(conv_.height), int(conv_.width), int(conv_.c)}};
  }

  Arrays apply(const Arrays& inputs) override {
    return {mx::array(output_shapes(inputs)[0], mx::float32, std::make_shared<InputGradient>(stream(), conv_, biased_),
                      inputs)};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override;

 protected:
  Work bind(const Arrays&) override {
    return [conv = conv_, biased = biased_](auto& in, auto& out) {
      input_gradient(conv, in[0], in[1], biased ? in[2] : nullptr, out[0]);
    };
  }

 private:
  Conv conv_;
  bool biased_;
};

/// x, weight, [bias], [residual], [scale, shift] -> y.
class Convolution : public CpuPrimitive {
 public:
  Convolution(mx::Stream s, Conv conv, bool biased, bool residual)
      : CpuPrimitive(s), conv_(conv), biased_(biased), residual_(residual) {}

  const char* name() const override { return "mflux::Convolution"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const Convolution&>(other);
    return conv_ == o.conv_ && biased_ == o.biased_ && residual_ == o.residual_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    return {{int(conv_.batch), int(conv_.out_height), int(conv_.out_width), int(conv_.o)}};
  }

  Arrays apply(const Arrays& inputs) override {
    return {mx::array(output_shapes(inputs)[0], mx::float32,
                      std::make_shared<Convolution>(stream(), conv_, biased_, residual_), inputs)};
  }

  /// Gradient of the image that the kernel moves over.
  mx::array input_gradient_of(const mx::array& weight, const mx::array& dy) {
    Conv back = conv_;
    back.affine = back.silu = back.doubled = false;
    back.height = conv_.seen_height();
    back.width = conv_.seen_width();
    if (conv_.stride > 1) {
      return InputGradient(stream(), back, false).apply({weight, dy})[0];
    }
    return Convolution(stream(), turned(back), false, false).apply({dy, weight})[0];
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    if (conv_.turned) {  // inputs are dy and weights of the convolution whose gradient this is: linear in both
      Arrays wanted;
      for (int argument : argnums) {
        wanted.push_back(argument == 0 ? Convolution(stream(), turned(conv_), false, false).apply({ready(cotangents[0]), primals[1]})[0]
                                       : WeightGradient(stream(), turned(conv_)).apply({ready(cotangents[0]), primals[0]})[0]);
      }
      return wanted;
    }
    const mx::array dy = ready(cotangents[0]);
    const int affine_at = 2 + biased_ + residual_;
    const AffineOptions options{conv_.affine, conv_.silu};
    Arrays before{primals[0]};
    before.insert(before.end(), primals.begin() + affine_at, primals.end());
    const auto needs = [&](auto test) { return std::any_of(argnums.begin(), argnums.end(), test); };
    Arrays through;  // gradients of x, scale and shift
    if (needs([&](int i) { return i == 0 || i >= affine_at; })) {
      mx::array du = input_gradient_of(primals[1], dy);
      if (conv_.doubled) {
        const mx::array four = mx::reshape(du, {int(conv_.batch), int(conv_.height), 2, int(conv_.width), 2, int(conv_.c)});
        du = ready(mx::sum(four, {2, 4}));
      }
      if (conv_.affine || conv_.silu) {
        Arrays inputs{before[0], du};
        inputs.insert(inputs.end(), before.begin() + 1, before.end());
        through = AffineBack(stream(), options).apply(inputs);
      } else {
        through = {du};
      }
    }
    Arrays wanted;
    for (int argument : argnums) {
      if (argument == 1) {
        mx::array u = before[0];
        if (conv_.affine || conv_.silu) {
          u = Affine(stream(), options).apply(before)[0];
        }
        Conv plain = conv_;
        plain.affine = plain.silu = plain.doubled = false;
        if (conv_.doubled) {
          u = ready(mx::repeat(mx::repeat(u, 2, 1), 2, 2));
          plain.height *= 2;
          plain.width *= 2;
        }
        wanted.push_back(WeightGradient(stream(), plain).apply({u, dy})[0]);
      } else if (argument == 2 && biased_) {
        wanted.push_back(channel_sum(dy));
      } else if (argument == 2 + biased_ && residual_) {
        wanted.push_back(dy);
      } else {
        wanted.push_back(through[argument == 0 ? 0 : argument - affine_at + 1]);
      }
    }
    return wanted;
  }

 protected:
  Work bind(const Arrays&) override {
    return [conv = conv_, biased = biased_, residual = residual_](auto& in, auto& out) {
      ConvArrays arrays{.x = in[0], .weight = in[1]};
      arrays.bias = biased ? in[2] : nullptr;
      arrays.residual = residual ? in[2 + biased] : nullptr;
      if (conv.affine) {
        arrays.scale = in[2 + biased + residual];
        arrays.shift = in[3 + biased + residual];
      }
      convolve(conv, arrays, out[0]);
    };
  }

 private:
  Conv conv_;
  bool biased_, residual_;
};

/// Linear in x and dy, too.
Arrays WeightGradient::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                           const Arrays&) {
  const mx::array d = ready(cotangents[0]);
  Convolution forward(stream(), conv_, false, false);
  Arrays wanted;
  for (int argument : argnums) {
    wanted.push_back(argument == 0 ? forward.input_gradient_of(d, primals[1]) : forward.apply({primals[0], d})[0]);
  }
  return wanted;
}

/// The operation is linear in weights and dy: gradients are the convolution itself, and its weight gradient.
Arrays InputGradient::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                          const Arrays&) {
  const mx::array d = ready(cotangents[0]);
  Arrays wanted;
  for (int argument : argnums) {
    if (argument == 0) {
      wanted.push_back(WeightGradient(stream(), conv_).apply({d, primals[1]})[0]);
    } else if (argument == 1) {
      wanted.push_back(Convolution(stream(), conv_, false, false).apply({d, primals[0]})[0]);
    } else {
      wanted.push_back(channel_sum(d));
    }
  }
  return wanted;
}

}  // namespace

mx::array conv_transpose2d(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias, int stride,
                           std::array<int, 2> padding, std::array<int, 2> size) {
  require(x.ndim() == 4 && weight.ndim() == 4 && x.shape(3) == weight.shape(3) && stride > 0 && padding[0] >= 0 && padding[1] >= 0,
          "conv_transpose2d: x must be (batch, h, w, c), weights (o, kh, kw, c)");
  const Conv conv{.batch = x.shape(0), .height = size[0], .width = size[1], .c = weight.shape(0), .o = x.shape(3),
                  .kh = weight.shape(1), .kw = weight.shape(2), .stride = stride, .top = padding[0], .left = padding[1],
                  .out_height = x.shape(1), .out_width = x.shape(2)};
  if (size[0] < 0 || size[1] < 0 || (bias && bias->shape() != mx::Shape{weight.shape(0)})) {
    throw std::invalid_argument("conv_transpose2d: negative size, or a bias without one number per output channel");
  }
  Arrays inputs{ready(mx::transpose(weight, {3, 1, 2, 0})), ready(x)};
  if (bias) {
    inputs.push_back(ready(*bias));
  }
  return InputGradient(cpu(), conv, bias.has_value()).apply(inputs)[0];
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
            .top = padding[0], .left = padding[2]};
  conv.affine = scale.has_value();
  conv.silu = silu;
  conv.doubled = doubled;
  conv.out_height = (conv.seen_height() + padding[0] + padding[1] - conv.kh) / stride + 1;
  conv.out_width = (conv.seen_width() + padding[2] + padding[3] - conv.kw) / stride + 1;
  require(conv.seen_height() + padding[0] + padding[1] >= conv.kh && conv.seen_width() + padding[2] + padding[3] >= conv.kw,
          "conv2d: the kernel is larger than the padded image");
  const mx::Shape result{int(conv.batch), int(conv.out_height), int(conv.out_width), int(conv.o)};
  require((!bias || bias->shape() == mx::Shape{int(conv.o)}) && (!residual || residual->shape() == result),
          "conv2d: the bias must be (o,), the residual as the result");
  require_pair(x, scale, shift);
  Arrays inputs{ready(x), ready(weight)};
  for (const auto& one : {bias, residual, scale, shift}) {
    if (one) {
      inputs.push_back(ready(*one));
    }
  }
  return Convolution(cpu(), conv, bias.has_value(), residual.has_value()).apply(inputs)[0];
}

mx::array affine(const mx::array& x, const std::optional<mx::array>& scale, const std::optional<mx::array>& shift,
                 bool silu) {
  require_pair(x, scale, shift);
  Arrays inputs{ready(x)};
  if (scale) {
    inputs.push_back(ready(*scale));
    inputs.push_back(ready(*shift));
  }
  return Affine(cpu(), {scale.has_value(), silu}).apply(inputs)[0];
}

}  // namespace mflux
