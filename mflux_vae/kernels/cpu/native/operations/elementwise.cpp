#include "operations/ops.h"

namespace mflux {
namespace {

struct ActivateOptions {
  Activation kind;
  float slope;

  bool operator==(const ActivateOptions&) const = default;
};

/// x, dy -> dy * activation'(x).
class ActivateBack : public Operation<ActivateBack, ActivateOptions> {
 public:
  static constexpr const char* NAME = "mflux::ActivateBack";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

 protected:
  Work bind(const Arrays& inputs) override {
    return [size = int64_t(inputs[0].size()), o = options_](auto& in, auto& out) {
      parallel_for(size, GRAIN, [&](int64_t begin, int64_t end) {
        kernels()->activate_back(o.kind, in[0] + begin, in[1] + begin, out[0] + begin, end - begin, o.slope);
      });
    };
  }
};

class Activate : public Operation<Activate, ActivateOptions> {
 public:
  static constexpr const char* NAME = "mflux::Activate";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>&, const Arrays&) override {
    return ActivateBack(options_, stream()).apply({primals[0], ready(cotangents[0])});
  }

 protected:
  Work bind(const Arrays& inputs) override {
    return [size = int64_t(inputs[0].size()), o = options_](auto& in, auto& out) {
      parallel_for(size, GRAIN, [&](int64_t begin, int64_t end) {
        kernels()->activate(o.kind, in[0] + begin, out[0] + begin, end - begin, o.slope);
      });
    };
  }
};

/// y, dy -> y * (dy - sum(y * dy)).
class SoftmaxBack : public Operation<SoftmaxBack, std::monostate> {
 public:
  static constexpr const char* NAME = "mflux::SoftmaxBack";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

 protected:
  Work bind(const Arrays& inputs) override {
    const int64_t width = inputs[0].shape(-1), rows = inputs[0].size() / std::max<int64_t>(width, 1);
    return [=](auto& in, auto& out) {
      parallel_for(rows, 1 + GRAIN / width, [&](int64_t begin, int64_t end) {
        kernels()->softmax_back(in[0], in[1], out[0], begin, end, width);
      });
    };
  }
};

class Softmax : public Operation<Softmax, std::monostate> {
 public:
  static constexpr const char* NAME = "mflux::Softmax";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

  Arrays vjp(const Arrays&, const Arrays& cotangents, const std::vector<int>&, const Arrays& outputs) override {
    return SoftmaxBack({}, stream()).apply({outputs[0], ready(cotangents[0])});
  }

 protected:
  Work bind(const Arrays& inputs) override {
    const int64_t width = inputs[0].shape(-1), rows = inputs[0].size() / std::max<int64_t>(width, 1);
    return [=](auto& in, auto& out) {
      parallel_for(rows, 1 + GRAIN / width,
                   [&](int64_t begin, int64_t end) { kernels()->softmax(in[0], out[0], begin, end, width); });
    };
  }
};

/// x twice, without a copy. The gradients of both are added first, in one order for every graph around them.
class Fork : public Operation<Fork, std::monostate> {
 public:
  static constexpr const char* NAME = "mflux::Fork";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape(), inputs[0].shape()}; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    for (auto& y : outputs) {
      y.copy_shared_buffer(inputs[0]);
    }
  }

  Arrays vjp(const Arrays&, const Arrays& cotangents, const std::vector<int>&, const Arrays&) override {
    return {mx::add(cotangents[0], cotangents[1])};
  }

 protected:
  Work bind(const Arrays&) override { return {}; }
};

struct GluOptions {
  Activation kind;
  bool joined, gate_first;

  bool operator==(const GluOptions&) const = default;
};

/// Rows of gate and of the other factor: two arrays (rows, width), or the halves of one (rows, 2 width).
struct GluRows {
  bool joined, gate_first;
  int64_t width, rows, step;

  GluRows(const mx::array& first, const GluOptions& o)
      : joined(o.joined), gate_first(o.gate_first), width(first.shape(-1) / (1 + joined)),
        rows(first.size() / std::max<int64_t>(first.shape(-1), 1)), step(first.shape(-1)) {}

  template <class T>
  T* gate(const std::vector<T*>& arrays, int64_t row) const {
    return arrays[0] + row * step + (joined && !gate_first ? width : 0);
  }
  template <class T>
  T* other(const std::vector<T*>& arrays, int64_t row) const {
    return (joined ? arrays[0] + (gate_first ? width : 0) : arrays[1]) + row * step;
  }
};

/// Inputs of `Glu` and dy -> their gradients.
class GluBack : public Operation<GluBack, GluOptions> {
 public:
  static constexpr const char* NAME = "mflux::GluBack";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return std::vector<mx::Shape>(inputs.size() - 1, inputs[0].shape());
  }

 protected:
  Work bind(const Arrays& inputs) override {
    return [at = GluRows(inputs[0], options_), kind = options_.kind](auto& in, auto& out) {
      parallel_for(at.rows, 1 + GRAIN / at.width, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          const float *dy = in.back() + row * at.width, *gate = at.gate(in, row), *other = at.other(in, row);
          float *of_gate = at.gate(out, row), *of_other = at.other(out, row);
          kernels()->activate(kind, gate, of_other, at.width, 0);
          for (int64_t i = 0; i < at.width; i++) {
            of_other[i] *= dy[i];
            of_gate[i] = dy[i] * other[i];
          }
          kernels()->activate_back(kind, gate, of_gate, of_gate, at.width, 0);
        }
      });
    };
  }
};

/// activation(gate) * other.
class Glu : public Operation<Glu, GluOptions> {
 public:
  static constexpr const char* NAME = "mflux::Glu";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape.back() /= 1 + options_.joined;
    return {shape};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    Arrays inputs(primals);
    inputs.push_back(ready(cotangents[0]));
    return select(GluBack(options_, stream()).apply(inputs), argnums);
  }

 protected:
  Work bind(const Arrays& inputs) override {
    return [at = GluRows(inputs[0], options_), kind = options_.kind](auto& in, auto& out) {
      parallel_for(at.rows, 1 + GRAIN / at.width, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          const float* other = at.other(in, row);
          float* y = out[0] + row * at.width;
          kernels()->activate(kind, at.gate(in, row), y, at.width, 0);
          for (int64_t i = 0; i < at.width; i++) {
            y[i] *= other[i];
          }
        }
      });
    };
  }
};

struct GatedOptions {
  bool added;
  int64_t groups;

  bool operator==(const GatedOptions&) const = default;
};

/// [x], gate (groups, width), y (groups, rows, width) -> x + gate * y.
class Gated : public Operation<Gated, GatedOptions> {
 public:
  static constexpr const char* NAME = "mflux::Gated";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs.back().shape()}; }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    const int gate_at = options_.added;
    const mx::array &gate = primals[gate_at], &y = primals.back(), &d = cotangents[0];
    Arrays wanted;
    for (int argument : argnums) {
      if (argument == gate_at + 1) {
        wanted.push_back(Gated({false, options_.groups}, stream()).apply({gate, ready(d)})[0]);
      } else if (argument == gate_at) {
        const mx::array product = mx::reshape(d * y, {int(options_.groups), -1, y.shape(-1)});
        wanted.push_back(mx::reshape(mx::sum(product, 1), gate.shape()));
      } else {
        wanted.push_back(d);
      }
    }
    return wanted;
  }

 protected:
  Work bind(const Arrays& inputs) override {
    const int64_t width = inputs.back().shape(-1), rows = inputs.back().size() / std::max<int64_t>(width, 1);
    return [=, o = options_](auto& in, auto& out) {
      const int64_t per_group = std::max<int64_t>(rows / o.groups, 1);
      parallel_for(rows, 1 + GRAIN / width, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          const float *gate = in[o.added] + row / per_group * width, *y = in[o.added + 1] + row * width;
          const float* x = o.added ? in[0] + row * width : nullptr;
          float* to = out[0] + row * width;
          for (int64_t i = 0; i < width; i++) {
            to[i] = gate[i] * y[i];
          }
          for (int64_t i = 0; x && i < width; i++) {
            to[i] += x[i];
          }
        }
      });
    };
  }
};

}  // namespace

std::pair<mx::array, mx::array> fork(const mx::array& x) {
  const Arrays both = Fork(std::monostate{}).apply({row_contiguous(ready(x))});
  return {both[0], both[1]};
}

mx::array glu(const mx::array& gate, const std::optional<mx::array>& other, Activation kind, bool gate_first) {
  require(gate.ndim() > 0 && (other ? other->shape() == gate.shape() : gate.shape(-1) % 2 == 0),
          "glu: two arrays of one shape, or one with an even last axis");
  Arrays inputs{ready(gate)};
  append(inputs, {other});
  return Glu({kind, !other, gate_first}).apply(inputs)[0];
}

mx::array gated(const mx::array& x, const mx::array& gate, const mx::array& y) {
  const int64_t width = y.ndim() ? y.shape(-1) : 0, groups = width ? gate.size() / width : 0;
  require(x.shape() == y.shape() && groups > 0 && int64_t(gate.size()) == groups * width &&
              (groups == 1 || groups == y.shape(0)),
          "gated: x and y have one shape, the gate is (width,) or (batch, 1, width)");
  return Gated({true, groups}).apply({ready(x), ready(gate), ready(y)})[0];
}

mx::array activate(const mx::array& x, Activation kind, float slope) {
  return Activate({kind, slope}).apply({ready(x)})[0];
}

mx::array softmax(const mx::array& x) { return Softmax(std::monostate{}).apply({ready(x)})[0]; }

}  // namespace mflux
