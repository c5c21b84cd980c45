#include <cmath>
#include <numeric>

#include "operations/ops.h"

namespace mflux {
namespace {

constexpr int64_t PART = 1024;  // numbers whose squares are added in float32
constexpr int64_t PARTS = 16;   // of a thread's least work
constexpr size_t LEAVES = 16;   // of one primitive: each of its results refers to all inputs

/// Part of one parameter: weights, first and second moments.
struct Part {
  const float *from[3], *gradient;
  float* to[3];
  int64_t count;
};

struct AdamWOptions {
  float beta1, rest1, beta2, rest2, eps;

  bool operator==(const AdamWOptions&) const = default;
};

struct Factors {
  float scale, decay, rate, correction;
};

/// Without fused multiply-add: rounding is that of the formula. Results may take the place of inputs.
/// `change`: (PART,), new weights - old weights.
__attribute__((optimize("O3", "no-math-errno", "fp-contract=off"))) void step(const Part& part, const AdamWOptions& o,
                                                                              const Factors& f, float* change) {
  const float *g0 = part.gradient, *w0 = part.from[0], *m0 = part.from[1], *v0 = part.from[2];
  float *w1 = part.to[0], *m1 = part.to[1], *v1 = part.to[2];
#pragma GCC ivdep
  for (int64_t i = 0; i < part.count; i++) {
    const float g = g0[i] * f.scale, m = o.beta1 * m0[i] + o.rest1 * g, v = o.beta2 * v0[i] + o.rest2 * (g * g);
    const float w = w0[i] * f.decay - f.rate * m / (std::sqrt(v * f.correction) + o.eps);
    change[i] = w - w0[i];
    w1[i] = w;
    m1[i] = m;
    v1[i] = v;
  }
}

/// Weights, gradients, first and second moments of n parameters, then scale, decay, rate and correction -> weights,
/// moments, sums of squares of change and of weights before (2,).
class AdamW : public Operation<AdamW, AdamWOptions> {
 public:
  static constexpr const char* NAME = "mflux::AdamW";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const size_t n = count(inputs);
    std::vector<mx::Shape> shapes;
    for (size_t i = 0; i < 3 * n; i++) {
      shapes.push_back(inputs[i < n ? i : i + n].shape());
    }
    shapes.push_back({2});
    return shapes;
  }

  /// Results take the memory of weights and moments that nothing else refers to.
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const size_t n = count(inputs);
    std::vector<Part> parts;
    for (const auto& x : inputs) {
      encoder.set_input_array(x);
    }
    for (auto& y : outputs) {  // every result holds the inputs, which counts as a use until MLX detaches them
      if (!y.is_tracer() && &y.inputs() != &inputs) {
        y.inputs().clear();
      }
      encoder.set_output_array(y);
    }
    for (size_t i = 0; i < n; i++) {
      Part leaf;
      for (size_t kind = 0; kind < 3; kind++) {
        const mx::array& from = inputs[kind == 0 ? i : (kind + 1) * n + i];
        mx::array& to = outputs[kind * n + i];
        if (from.is_donatable()) {
          to.copy_shared_buffer(from);
        } else {
          to.set_data(mx::allocator::malloc(to.nbytes()));
        }
        leaf.from[kind] = from.data<float>();
        leaf.to[kind] = to.data<float>();
      }
      leaf.gradient = inputs[n + i].data<float>();
      const int64_t size = inputs[i].size();
      for (int64_t begin = 0; begin < size; begin += PART) {
        Part part = leaf;
        part.gradient += begin;
        for (size_t kind = 0; kind < 3; kind++) {
          part.from[kind] += begin;
          part.to[kind] += begin;
        }
        part.count = std::min(PART, size - begin);
        parts.push_back(part);
      }
    }
    outputs[3 * n].set_data(mx::allocator::malloc(outputs[3 * n].nbytes()));
    const float *scale = inputs[4 * n].data<float>(), *decay = inputs[4 * n + 1].data<float>(),
                *rate = inputs[4 * n + 2].data<float>(), *correction = inputs[4 * n + 3].data<float>();
    float* squares = outputs[3 * n].data<float>();
    encoder.dispatch([=, parts = std::move(parts), o = options_] {
      const Factors factors{*scale, *decay, *rate, *correction};
      std::vector<std::array<float, 2>> sums(parts.size());
      parallel_for(parts.size(), PARTS, [&](int64_t begin, int64_t end) {
        float change[PART];
        for (int64_t i = begin; i < end; i++) {
          sums[i][1] = kernels()->dot(parts[i].from[0], parts[i].from[0], parts[i].count);
          step(parts[i], o, factors, change);
          sums[i][0] = kernels()->dot(change, change, parts[i].count);
        }
      });
      for (int kind = 0; kind < 2; kind++) {
        double sum = 0;
        for (const auto& each : sums) {
          sum += each[kind];
        }
        squares[kind] = float(sum);
      }
    });
  }

 protected:
  static size_t count(const Arrays& inputs) { return (inputs.size() - 4) / 4; }

  Work bind(const Arrays&) override { return {}; }
};

/// Sum of the squares of all numbers.
class SumOfSquares : public Operation<SumOfSquares, std::monostate> {
 public:
  static constexpr const char* NAME = "mflux::SumOfSquares";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays&) override { return {mx::Shape{}}; }

 protected:
  Work bind(const Arrays& inputs) override {
    std::vector<int64_t> sizes;
    for (const auto& x : inputs) {
      sizes.push_back(x.size());
    }
    return [sizes](const std::vector<const float*>& in, const std::vector<float*>& out) {
      std::vector<std::pair<const float*, int64_t>> parts;
      for (size_t i = 0; i < sizes.size(); i++) {
        for (int64_t begin = 0; begin < sizes[i]; begin += PART) {
          parts.emplace_back(in[i] + begin, std::min(PART, sizes[i] - begin));
        }
      }
      std::vector<float> sums(parts.size());
      parallel_for(parts.size(), PARTS, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          sums[i] = kernels()->dot(parts[i].first, parts[i].first, parts[i].second);
        }
      });
      *out[0] = float(std::accumulate(sums.begin(), sums.end(), 0.0));
    };
  }
};

}  // namespace

mx::array sum_of_squares(const Arrays& arrays) {
  Arrays inputs;
  for (const auto& x : arrays) {
    inputs.push_back(ready(x));
  }
  return SumOfSquares(std::monostate{}).apply(inputs)[0];
}

std::tuple<Arrays, Arrays, Arrays, mx::array> adamw(const Arrays& weights, const Arrays& gradients, const Arrays& m,
                                                    const Arrays& v, const mx::array& scale, const mx::array& decay,
                                                    const mx::array& rate, const mx::array& correction, double beta1,
                                                    double beta2, double eps) {
  const size_t n = weights.size();
  require(gradients.size() == n && m.size() == n && v.size() == n, "adamw: lists of different lengths");
  const AdamWOptions options{float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(eps)};
  Arrays factors;
  for (const mx::array& one : {scale, decay, rate, correction}) {
    require(one.size() == 1, "adamw: scale, decay, rate and correction are single numbers");
    factors.push_back(row_contiguous(ready(one)));
  }
  std::array<Arrays, 3> results;
  mx::array squares = mx::zeros({2});
  for (size_t first = 0; first < n; first += LEAVES) {
    const size_t last = std::min(first + LEAVES, n);
    Arrays inputs;
    for (const Arrays* list : {&weights, &gradients, &m, &v}) {
      for (size_t i = first; i < last; i++) {
        require((*list)[i].shape() == weights[i].shape(),
                "adamw: a gradient or moment has another shape than its parameter");
        inputs.push_back(row_contiguous(ready((*list)[i])));
      }
    }
    inputs.insert(inputs.end(), factors.begin(), factors.end());
    const Arrays all = AdamW(options).apply(inputs);
    for (size_t part = 0; part < 3; part++) {
      const auto begin = all.begin() + part * (last - first);
      results[part].insert(results[part].end(), begin, begin + (last - first));
    }
    squares = mx::add(squares, all.back());
  }
  return {results[0], results[1], results[2], squares};
}

}  // namespace mflux
