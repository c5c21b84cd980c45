#include "compute/gemm.h"
#include "operations/ops.h"

namespace mflux {
namespace {

/// x W^T + bias + scale * (x A) B; W (n, k) is dense, or quantized if `bits`.
struct AdaptedOptions {
  int64_t k, n, rank, bits, group;
  bool biased, adapted;
  float scale;
  bool wants_x = true;  // of the gradients

  int weights() const { return bits ? 3 : 1; }
  bool operator==(const AdaptedOptions&) const = default;
};

using Pointers = std::vector<const float*>;

/// Packs parts of quantized W^T, or of W if `back`; `w` points to the pointers of the weights.
Packer packer(const AdaptedOptions& o, const float* const* w, bool back) {
  const auto* words = reinterpret_cast<const uint32_t*>(w[0]);
  const float *scales = w[1], *biases = w[2];
  return [=](int64_t from, int64_t depth, int64_t left, int64_t count, float* packed) {
    const int64_t groups = o.k / o.group;
    const Floats rows = floats(kernels()->tile_columns * depth);
    const auto row = [&](int64_t output, int64_t begin, int64_t end, float* to) {
      kernels()->dequantize(words + output * (o.k * o.bits / 32), scales + output * groups, biases + output * groups,
                            o.bits, o.group, begin, end, to);
    };
    each_panel(count, [&](int64_t first, int64_t columns, int64_t) {
      if (back) {
        for (int64_t i = 0; i < depth; i++) {
          row(from + i, left + first, left + first + columns, rows.get() + i * columns);
        }
        kernels()->pack({rows.get(), columns, 1}, depth, columns, packed + first * depth);
      } else {
        for (int64_t j = 0; j < columns; j++) {
          row(left + first + j, from, from + depth, rows.get() + j * depth);
        }
        kernels()->pack({rows.get(), 1, depth}, depth, columns, packed + first * depth);
      }
    });
  };
}

/// y (m, ...) = x W^T, or x W if `back`; or += if `add`.
void multiply(const AdaptedOptions& o, const float* x, const float* const* w, bool back, float* y, int64_t m,
              const Epilogue& last, bool add) {
  const int64_t k = back ? o.n : o.k, n = back ? o.k : o.n;
  if (o.bits) {
    gemm({x, k, 1}, packer(o, w, back), y, m, n, k, last, add);
  } else {
    gemm({x, k, 1}, back ? Matrix{w[0], o.k, 1} : Matrix{w[0], 1, o.k}, y, m, n, k, last, add);
  }
}

/// dy, weights, [A, B, x, u] -> [dx if `wants_x`], [dA, dB]; u is scale * x A.
class AdaptedLinearBack : public Operation<AdaptedLinearBack, AdaptedOptions> {
 public:
  static constexpr const char* NAME = "mflux::AdaptedLinearBack";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes;
    if (options_.wants_x) {
      shapes.push_back(inputs[0].shape());
      shapes.back().back() = int(options_.k);
    }
    if (options_.adapted) {
      shapes.push_back(inputs[1 + options_.weights()].shape());
      shapes.push_back(inputs[2 + options_.weights()].shape());
    }
    return shapes;
  }

 protected:
  Work bind(const Arrays& inputs) override {
    const int64_t m = options_.n ? int64_t(inputs[0].size()) / options_.n : 0;
    return [=, o = options_](const Pointers& in, const std::vector<float*>& out) {
      const float *dy = in[0], *const *rest = in.data() + 1 + o.weights();
      if (o.adapted) {
        const float *a = rest[0], *b = rest[1], *x = rest[2], *u = rest[3];
        std::vector<float> dt(m * o.rank);
        gemm({dy, o.n, 1}, {b, 1, o.n}, dt.data(), m, o.rank, o.n, {});
        for (float& value : dt) {
          value *= o.scale;
        }
        if (o.wants_x) {
          gemm({dt.data(), o.rank, 1}, {a, 1, o.rank}, out[0], m, o.k, o.rank, {});
        }
        std::vector<float> turned(o.rank * o.k);  // gradient of A: rank rows spare a transposed copy of x
        gemm({dt.data(), 1, o.rank}, Matrix{x, o.k, 1}, turned.data(), o.rank, o.k, m, {});
        kernels()->transpose(turned.data(), o.k, o.rank, o.k, out[o.wants_x], o.rank);
        gemm({u, 1, o.rank}, {dy, o.n, 1}, out[o.wants_x + 1], o.rank, o.n, m, {});
      }
      if (o.wants_x) {
        multiply(o, dy, in.data() + 1, true, out[0], m, {}, o.adapted);
      }
    };
  }
};

/// x, weights (1 or 3), [bias], [A, B] -> y, [u].
class AdaptedLinear : public Operation<AdaptedLinear, AdaptedOptions> {
 public:
  static constexpr const char* NAME = "mflux::AdaptedLinear";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes{inputs[0].shape()};
    shapes[0].back() = int(options_.n);
    if (options_.adapted) {
      shapes.push_back(inputs[0].shape());
      shapes[1].back() = int(options_.rank);
    }
    return shapes;
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    const AdaptedOptions& o = options_;
    const mx::array dy = ready(cotangents[0]);
    const int bias_at = 1 + o.weights(), a_at = bias_at + o.biased;
    const auto needs = [&](auto test) { return std::any_of(argnums.begin(), argnums.end(), test); };
    AdaptedOptions back = o;
    back.wants_x = needs([](int i) { return i == 0; });
    Arrays all;
    if (back.wants_x || needs([&](int i) { return i >= a_at; })) {
      Arrays inputs{dy};
      inputs.insert(inputs.end(), primals.begin() + 1, primals.begin() + bias_at);
      if (o.adapted) {
        inputs.insert(inputs.end(), {primals[a_at], primals[a_at + 1], primals[0], outputs[1]});
      }
      all = AdaptedLinearBack(back, stream()).apply(inputs);
    }
    Arrays wanted;
    for (int argument : argnums) {
      if (argument == 0) {
        wanted.push_back(all[0]);
      } else if (argument >= a_at) {
        wanted.push_back(all[back.wants_x + argument - a_at]);
      } else if (argument == bias_at) {
        wanted.push_back(channel_sum(dy));
      } else if (o.bits) {
        throw std::invalid_argument("quantized weights have no gradient");
      } else {
        const mx::array rows = mx::reshape(dy, {-1, int(o.n)}), x = mx::reshape(primals[0], {-1, int(o.k)});
        wanted.push_back(Linear({.x_turned = true, .weight_turned = true}, stream()).apply({rows, x})[0]);
      }
    }
    return wanted;
  }

 protected:
  Work bind(const Arrays& inputs) override {
    const int64_t m = options_.k ? int64_t(inputs[0].size()) / options_.k : 0;
    return [=, o = options_](const Pointers& in, const std::vector<float*>& out) {
      const int bias_at = 1 + o.weights(), a_at = bias_at + o.biased;
      if (o.adapted) {
        const float *a = in[a_at], *b = in[a_at + 1];
        gemm({in[0], o.k, 1}, {a, o.rank, 1}, out[1], m, o.rank, o.k, {});
        for (int64_t i = 0; i < m * o.rank; i++) {
          out[1][i] *= o.scale;
        }
        gemm({out[1], o.rank, 1}, {b, o.n, 1}, out[0], m, o.n, o.rank, {});
      }
      multiply(o, in[0], in.data() + 1, false, out[0], m, {.bias = o.biased ? in[bias_at] : nullptr}, o.adapted);
    };
  }
};

/// `weights` are ready.
mx::array adapted(const mx::array& x, const Arrays& weights, AdaptedOptions o, const std::optional<mx::array>& bias,
                  const std::optional<Lora>& lora) {
  require(x.ndim() > 0 && x.shape(-1) == o.k && o.k > 0, "linear: the last axis of x and the weights do not fit");
  require(!bias || bias->shape() == mx::Shape{int(o.n)}, "linear: the bias needs one number per output");
  Arrays inputs{ready(x)};
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  o.biased = bias.has_value();
  o.adapted = lora.has_value();
  append(inputs, {bias});
  if (lora) {
    const auto& [a, b, scale] = *lora;
    require(a.ndim() == 2 && b.ndim() == 2 && a.shape(0) == o.k && b.shape(1) == o.n && a.shape(1) == b.shape(0),
            "linear: LoRA's matrices must be (inputs, rank) and (rank, outputs)");
    o.rank = a.shape(1);
    o.scale = scale;
    append(inputs, {a, b});
  }
  return AdaptedLinear(o).apply(inputs)[0];
}

}  // namespace

mx::array lora_linear(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias,
                      const Lora& lora) {
  require(weight.ndim() == 2, "linear: the weights must be (outputs, inputs)");
  return adapted(x, {ready(weight)}, {.k = weight.shape(1), .n = weight.shape(0)}, bias, lora);
}

mx::array quantized_linear(const mx::array& x, const mx::array& weight, const mx::array& scales,
                           const mx::array& biases, int group_size, int bits, const std::optional<mx::array>& bias,
                           const std::optional<Lora>& lora) {
  require(bits == 4 || bits == 8, "quantized_linear: bits must be 4 or 8");
  const int64_t k = weight.ndim() == 2 ? int64_t(weight.shape(1)) * 32 / bits : 0, n = k ? weight.shape(0) : 0;
  const mx::Shape groups{int(n), group_size > 0 ? int(k / group_size) : 0};
  require(weight.dtype() == mx::uint32 && k > 0 && group_size >= 8 && group_size % 8 == 0 && k % group_size == 0 &&
              scales.shape() == groups && biases.shape() == groups,
          "quantized_linear: weights, scales and biases must be those of mx.quantize");
  return adapted(x, {weight, ready(scales), ready(biases)}, {.k = k, .n = n, .bits = bits, .group = group_size},
                 bias, lora);
}

}  // namespace mflux
