#include <cmath>

#include "operations/ops.h"

namespace mflux {
namespace {

constexpr size_t LEAVES = 16;  // of one primitive: each of its results refers to all inputs

/// Pointers of one parameter: weights, first and second moments.
struct Leaf {
  const float *from[3], *gradient;
  float* to[3];
};

struct AdamWOptions {
  float beta1, rest1, beta2, rest2, eps;

  bool operator==(const AdamWOptions&) const = default;
};

/// Without fused multiply-add: rounding is that of the formula. Results may take the place of inputs.
__attribute__((optimize("O3", "no-math-errno", "fp-contract=off"))) void step(
    const Leaf& leaf, int64_t begin, int64_t end, const AdamWOptions& o, float decay, float rate, float correction) {
  const float *g = leaf.gradient, *w0 = leaf.from[0], *m0 = leaf.from[1], *v0 = leaf.from[2];
  float *w1 = leaf.to[0], *m1 = leaf.to[1], *v1 = leaf.to[2];
#pragma GCC ivdep
  for (int64_t i = begin; i < end; i++) {
    const float m = o.beta1 * m0[i] + o.rest1 * g[i], v = o.beta2 * v0[i] + o.rest2 * (g[i] * g[i]);
    w1[i] = w0[i] * decay - rate * m / (std::sqrt(v * correction) + o.eps);
    m1[i] = m;
    v1[i] = v;
  }
}

/// Weights, gradients, first and second moments of n parameters, then decay, rate and correction -> weights, moments.
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
    return shapes;
  }

  /// Results take the memory of weights and moments that nothing else refers to.
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    const size_t n = count(inputs);
    std::vector<Leaf> leaves(n);
    std::vector<int64_t> starts{0};
    for (const auto& x : inputs) {
      encoder.set_input_array(x);
    }
    for (auto& y : outputs) {  // every result holds the inputs, which counts as a use until MLX detaches them
      if (!y.is_tracer() && &y.inputs() != &inputs) {
        y.inputs().clear();
      }
    }
    for (size_t i = 0; i < n; i++) {
      for (size_t part = 0; part < 3; part++) {
        const mx::array& from = inputs[part == 0 ? i : (part + 1) * n + i];
        mx::array& to = outputs[part * n + i];
        if (from.is_donatable()) {
          to.copy_shared_buffer(from);
        } else {
          to.set_data(mx::allocator::malloc(to.nbytes()));
        }
        encoder.set_output_array(to);
        leaves[i].from[part] = from.data<float>();
        leaves[i].to[part] = to.data<float>();
      }
      leaves[i].gradient = inputs[n + i].data<float>();
      starts.push_back(starts.back() + int64_t(inputs[i].size()));
    }
    const float *decay = inputs[4 * n].data<float>(), *rate = inputs[4 * n + 1].data<float>(),
                *correction = inputs[4 * n + 2].data<float>();
    encoder.dispatch([=, leaves = std::move(leaves), starts = std::move(starts), o = options_] {
      parallel_for(starts.back(), 2 * GRAIN, [&](int64_t begin, int64_t end) {
        size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
        for (; i < leaves.size() && starts[i] < end; i++) {
          const int64_t first = std::max(begin, starts[i]) - starts[i], last = std::min(end, starts[i + 1]) - starts[i];
          step(leaves[i], first, last, o, *decay, *rate, *correction);
        }
      });
    });
  }

 protected:
  static size_t count(const Arrays& inputs) { return (inputs.size() - 3) / 4; }

  Work bind(const Arrays&) override { return {}; }
};

}  // namespace

std::tuple<Arrays, Arrays, Arrays> adamw(const Arrays& weights, const Arrays& gradients, const Arrays& m,
                                         const Arrays& v, const mx::array& decay, const mx::array& rate,
                                         const mx::array& correction, double beta1, double beta2, double eps) {
  const size_t n = weights.size();
  require(gradients.size() == n && m.size() == n && v.size() == n, "adamw: lists of different lengths");
  require(decay.size() == 1 && rate.size() == 1 && correction.size() == 1,
          "adamw: decay, rate and correction are single numbers");
  const AdamWOptions options{float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(eps)};
  const Arrays factors{ready(decay), ready(rate), ready(correction)};
  std::array<Arrays, 3> results;
  for (size_t first = 0; first < n; first += LEAVES) {
    const size_t last = std::min(first + LEAVES, n);
    Arrays inputs;
    for (const Arrays* list : {&weights, &gradients, &m, &v}) {
      for (size_t i = first; i < last; i++) {
        require((*list)[i].shape() == weights[i].shape(),
                "adamw: a gradient or moment has another shape than its parameter");
        inputs.push_back(ready((*list)[i]));
      }
    }
    inputs.insert(inputs.end(), factors.begin(), factors.end());
    const Arrays all = AdamW(options).apply(inputs);
    for (size_t part = 0; part < 3; part++) {
      const auto begin = all.begin() + part * (last - first);
      results[part].insert(results[part].end(), begin, begin + (last - first));
    }
  }
  return {results[0], results[1], results[2]};
}

}  // namespace mflux
