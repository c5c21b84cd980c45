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

}  // namespace

std::pair<mx::array, mx::array> fork(const mx::array& x) {
  const Arrays both = Fork(std::monostate{}).apply({ready(x)});
  return {both[0], both[1]};
}

mx::array activate(const mx::array& x, Activation kind, float slope) {
  return Activate({kind, slope}).apply({ready(x)})[0];
}

mx::array softmax(const mx::array& x) { return Softmax(std::monostate{}).apply({ready(x)})[0]; }

}  // namespace mflux
