#include "operations/ops.h"

namespace mflux {
namespace {

constexpr int64_t GRAIN = 8192;

class Activate : public CpuPrimitive {
 public:
  Activate(mx::Stream s, Activation kind, float slope) : CpuPrimitive(s), kind_(kind), slope_(slope) {}

  const char* name() const override { return "mflux::Activate"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const Activate&>(other);
    return kind_ == o.kind_ && slope_ == o.slope_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>&, const Arrays&) override;

 protected:
  Work bind(const Arrays& inputs) override {
    return [size = int64_t(inputs[0].size()), kind = kind_, slope = slope_](auto& in, auto& out) {
      parallel_for(size, GRAIN, [&](int64_t begin, int64_t end) {
        kernels()->activate(kind, in[0] + begin, out[0] + begin, end - begin, slope);
      });
    };
  }

  Arrays apply(const Arrays& inputs) override { return {activate(inputs[0], kind_, slope_)}; }

 private:
  Activation kind_;
  float slope_;
};

/// dy * activation'(x).
class ActivateBack : public CpuPrimitive {
 public:
  ActivateBack(mx::Stream s, Activation kind, float slope) : CpuPrimitive(s), kind_(kind), slope_(slope) {}

  const char* name() const override { return "mflux::ActivateBack"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const ActivateBack&>(other);
    return kind_ == o.kind_ && slope_ == o.slope_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

 protected:
  Work bind(const Arrays& inputs) override {
    return [size = int64_t(inputs[0].size()), kind = kind_, slope = slope_](auto& in, auto& out) {
      parallel_for(size, GRAIN, [&](int64_t begin, int64_t end) {
        kernels()->activate_back(kind, in[0] + begin, in[1] + begin, out[0] + begin, end - begin, slope);
      });
    };
  }

  Arrays apply(const Arrays& inputs) override {
    const mx::array x = ready(inputs[0]);
    return {mx::array(x.shape(), mx::float32, std::make_shared<ActivateBack>(stream(), kind_, slope_),
                      {x, ready(inputs[1])})};
  }

 private:
  Activation kind_;
  float slope_;
};

Arrays Activate::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>&, const Arrays&) {
  return {mx::array(primals[0].shape(), mx::float32, std::make_shared<ActivateBack>(stream(), kind_, slope_),
                    {ready(primals[0]), ready(cotangents[0])})};
}

class Softmax : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;

  const char* name() const override { return "mflux::Softmax"; }

  bool is_equivalent(const mx::Primitive&) const override { return true; }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>&, const Arrays& outputs) override;

 protected:
  Work bind(const Arrays& inputs) override {
    const int64_t width = inputs[0].shape(-1), rows = inputs[0].size() / std::max<int64_t>(width, 1);
    return [=](auto& in, auto& out) {
      parallel_for(rows, 1 + GRAIN / width,
                   [&](int64_t begin, int64_t end) { kernels()->softmax(in[0], out[0], begin, end, width); });
    };
  }

  Arrays apply(const Arrays& inputs) override { return {mflux::softmax(inputs[0])}; }
};

/// y * (dy - sum(y * dy)).
class SoftmaxBack : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;

  const char* name() const override { return "mflux::SoftmaxBack"; }

  bool is_equivalent(const mx::Primitive&) const override { return true; }

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

  Arrays apply(const Arrays& inputs) override {
    const mx::array y = ready(inputs[0]);
    return {mx::array(y.shape(), mx::float32, std::make_shared<SoftmaxBack>(stream()), {y, ready(inputs[1])})};
  }
};

Arrays Softmax::vjp(const Arrays&, const Arrays& cotangents, const std::vector<int>&, const Arrays& outputs) {
  return {mx::array(outputs[0].shape(), mx::float32, std::make_shared<SoftmaxBack>(stream()),
                    {outputs[0], ready(cotangents[0])})};
}

}  // namespace

mx::array activate(const mx::array& x, Activation kind, float slope) {
  const mx::array input = ready(x);
  return mx::array(input.shape(), mx::float32,
                   std::make_shared<Activate>(mx::default_stream(mx::Device::cpu), kind, slope), {input});
}

mx::array softmax(const mx::array& x) {
  const mx::array input = ready(x);
  return mx::array(input.shape(), mx::float32, std::make_shared<Softmax>(mx::default_stream(mx::Device::cpu)),
                   {input});
}

}  // namespace mflux
