#include "operations/ops.h"

namespace mflux {
namespace {

struct RotaryOptions {
  int64_t parts;
  float eps;
  bool halves;
  bool wants_weights = true;  // of the gradients

  bool operator==(const RotaryOptions&) const = default;
};

/// Sizes of parts (batch, positions, heads, width) that follow each other along the positions.
struct RotaryShape {
  int64_t batch, positions, heads, width;
  bool shared;                // angles are those of all samples
  std::vector<int64_t> ends;  // positions after each part

  RotaryShape(const Arrays& inputs, int64_t parts)
      : batch(inputs[0].shape(0)), positions(0), heads(inputs[0].shape(2)), width(inputs[0].shape(3)) {
    for (int64_t i = 0; i < parts; i++) {
      ends.push_back(positions += inputs[i].shape(1));
    }
    shared = int64_t(inputs[2 * parts].size()) == positions * width;
  }

  int64_t first(int64_t part) const { return part ? ends[part - 1] : 0; }
  int64_t tokens(int64_t part) const { return batch * (ends[part] - first(part)); }
  /// Token of the joined parts.
  int64_t joined(int64_t part, int64_t token) const {
    const int64_t count = ends[part] - first(part);
    return token / count * positions + first(part) + token % count;
  }
  int64_t angle(int64_t token) const { return (shared ? token % positions : token) * width; }
  int64_t grain() const { return 1 + GRAIN / std::max<int64_t>(heads * width, 1); }
};

/// Parts of x, their weights, cos, sin, statistics, dy -> gradients of the parts, [of the weights].
class NormRotaryBack : public Operation<NormRotaryBack, RotaryOptions> {
 public:
  static constexpr const char* NAME = "mflux::NormRotaryBack";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes;
    for (int64_t i = 0; i < options_.parts * (1 + options_.wants_weights); i++) {
      shapes.push_back(inputs[i].shape());
    }
    return shapes;
  }

 protected:
  Work bind(const Arrays& inputs) override {
    return [o = options_, shape = RotaryShape(inputs, options_.parts)](auto& in, auto& out) {
      const float *const *rest = in.data() + 2 * o.parts, *cos = rest[0], *sin = rest[1], *stats = rest[2], *dy = rest[3];
      const int64_t size = shape.heads * shape.width;
      for (int64_t part = 0; part < o.parts; part++) {
        float* const sums = o.wants_weights ? out[o.parts + part] : nullptr;
        parallel_sum(shape.tokens(part), shape.grain(), sums ? shape.width : 0, sums,
                     [&](int64_t begin, int64_t end, float* partial) {
          std::vector<float> turned(size);
          for (int64_t token = begin; token < end; token++) {
            const int64_t at = shape.joined(part, token), angle = shape.angle(at);
            kernels()->rotate(o.halves, dy + at * size, cos + angle, sin + angle, true, turned.data(), shape.heads, shape.width);
            kernels()->norm_back(true, in[part] + token * size, in[o.parts + part], 0, turned.data(),
                                 stats + at * 2 * shape.heads, out[part] + token * size, sums ? partial : nullptr,
                                 nullptr, 0, shape.heads, shape.width, shape.heads);
          }
        });
      }
    };
  }
};

/// Parts of x, their weights, cos, sin -> y, mean and rstd of each head. Angles have no gradient.
class NormRotary : public Operation<NormRotary, RotaryOptions> {
 public:
  static constexpr const char* NAME = "mflux::NormRotary";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const RotaryShape shape(inputs, options_.parts);
    const int batch = int(shape.batch), positions = int(shape.positions), heads = int(shape.heads);
    return {{batch, positions, heads, int(shape.width)}, {batch, positions, heads, 2}};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    const int weights = int(options_.parts), angles = 2 * weights;
    RotaryOptions back = options_;
    back.wants_weights = std::any_of(argnums.begin(), argnums.end(), [&](int i) { return i >= weights && i < angles; });
    Arrays inputs(primals);
    inputs.insert(inputs.end(), {outputs[1], ready(cotangents[0])});
    const Arrays all = NormRotaryBack(back, stream()).apply(inputs);
    Arrays wanted;
    for (int argument : argnums) {
      wanted.push_back(argument < angles ? all[argument] : mx::zeros_like(primals[argument]));
    }
    return wanted;
  }

 protected:
  Work bind(const Arrays& inputs) override {
    return [o = options_, shape = RotaryShape(inputs, options_.parts)](auto& in, auto& out) {
      const float *cos = in[2 * o.parts], *sin = in[2 * o.parts + 1];
      const int64_t size = shape.heads * shape.width;
      for (int64_t part = 0; part < o.parts; part++) {
        parallel_for(shape.tokens(part), shape.grain(), [&](int64_t begin, int64_t end) {
          for (int64_t token = begin; token < end; token++) {
            const int64_t at = shape.joined(part, token), angle = shape.angle(at);
            float* const y = out[0] + at * size;
            kernels()->norm(true, in[part] + token * size, in[o.parts + part], 0, nullptr, y,
                            out[1] + at * 2 * shape.heads, 0, shape.heads, shape.width, shape.heads, o.eps);
            kernels()->rotate(o.halves, y, cos + angle, sin + angle, false, y, shape.heads, shape.width);
          }
        });
      }
    };
  }
};

}  // namespace

mx::array norm_rotary(const Arrays& parts, const Arrays& weights, const mx::array& cos, const mx::array& sin, float eps,
                      bool halves) {
  require(!parts.empty() && parts.size() == weights.size(), "norm_rotary: as many weights as parts");
  Arrays inputs;
  int64_t positions = 0;
  for (const mx::array& x : parts) {
    require(x.ndim() == 4 && x.shape(3) % 2 == 0 && x.shape(0) == parts[0].shape(0) && x.shape(2) == parts[0].shape(2) &&
                x.shape(3) == parts[0].shape(3),
            "norm_rotary: parts must be (batch, positions, heads, width) with an even width");
    inputs.push_back(ready(x));
    positions += x.shape(1);
  }
  const int64_t width = parts[0].shape(3), all = parts[0].shape(0) * positions * width;
  for (const mx::array& weight : weights) {
    require(weight.shape() == mx::Shape{int(width)}, "norm_rotary: weights must be (width,)");
    inputs.push_back(ready(weight));
  }
  for (const mx::array& angle : {cos, sin}) {
    const int64_t size = angle.size();
    require(size == int64_t(cos.size()) && (size == positions * width || size == all),
            "norm_rotary: angles must be (positions, 1, width) or (batch, positions, 1, width)");
    inputs.push_back(ready(angle));
  }
  return NormRotary({.parts = int64_t(parts.size()), .eps = eps, .halves = halves}).apply(inputs)[0];
}

}  // namespace mflux
