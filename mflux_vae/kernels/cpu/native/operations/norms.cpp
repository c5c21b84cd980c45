#include "operations/ops.h"

namespace mflux {
namespace {

struct NormOptions {
  bool rms, scaled, shifted;
  float eps, offset;
  int64_t groups;

  bool operator==(const NormOptions&) const = default;
};

/// Rows and widths of an array that is normalized over its last axis.
struct Rows {
  int64_t width, count, per_group, grain;

  Rows(const mx::array& x, int64_t groups)
      : width(x.shape(-1)),
        count(x.size() / std::max<int64_t>(width, 1)),
        per_group(std::max<int64_t>(count / groups, 1)),
        grain(1 + GRAIN / std::max<int64_t>(width, 1)) {}
};

/// x, [scale], [shift] -> y, mean and rstd of each row.
class Norm : public Operation<Norm, NormOptions> {
 public:
  static constexpr const char* NAME = "mflux::Norm";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape(), {int(Rows(inputs[0], 1).count), 2}};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>&, const Arrays& outputs) override;

 protected:
  Work bind(const Arrays& inputs) override {
    return [rows = Rows(inputs[0], options_.groups), o = options_](auto& in, auto& out) {
      const float* scale = o.scaled ? in[1] : nullptr;
      const float* shift = o.shifted ? in[1 + o.scaled] : nullptr;
      parallel_for(rows.count, rows.grain, [&](int64_t begin, int64_t end) {
        kernels()->norm(o.rms, in[0], scale, o.offset, shift, out[0], out[1], begin, end, rows.width, rows.per_group, o.eps);
      });
    };
  }
};

/// x, dy, statistics, [scale] -> dx, [dscale], [dshift]; gradients of each group, (groups, width).
class NormBack : public Operation<NormBack, NormOptions> {
 public:
  static constexpr const char* NAME = "mflux::NormBack";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    std::vector<mx::Shape> shapes{inputs[0].shape()};
    for (int i = 0; i < options_.scaled + options_.shifted; i++) {
      shapes.push_back({int(options_.groups), inputs[0].shape(-1)});
    }
    return shapes;
  }

 protected:
  Work bind(const Arrays& inputs) override {
    return [rows = Rows(inputs[0], options_.groups), o = options_](auto& in, auto& out) {
      const float* scale = o.scaled ? in[3] : nullptr;
      const int64_t sums = rows.width * (o.scaled + o.shifted);
      std::vector<float> total(sums);
      for (int64_t group = 0; group < o.groups; group++) {
        const int64_t first = group * rows.per_group;
        parallel_sum(rows.per_group, rows.grain, sums, total.data(), [&](int64_t begin, int64_t end, float* partial) {
          float* dscale = o.scaled ? partial : nullptr;
          float* dshift = o.shifted ? partial + o.scaled * rows.width : nullptr;
          kernels()->norm_back(o.rms, in[0], scale, o.offset, in[1], in[2], out[0], dscale, dshift, first + begin, first + end,
                               rows.width, rows.per_group);
        });
        for (int i = 0; i < o.scaled + o.shifted; i++) {
          std::copy_n(total.data() + i * rows.width, rows.width, out[1 + i] + group * rows.width);
        }
      }
    };
  }
};

Arrays Norm::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                 const Arrays& outputs) {
  Arrays inputs{primals[0], ready(cotangents[0]), outputs[1]};
  if (options_.scaled) {
    inputs.push_back(primals[1]);
  }
  const Arrays all = NormBack(options_, stream()).apply(inputs);
  Arrays wanted;
  for (int argument : argnums) {
    wanted.push_back(argument == 0 ? all[0] : mx::reshape(all[argument], primals[argument].shape(), stream()));
  }
  return wanted;
}

}  // namespace

mx::array norm(const mx::array& x, const std::optional<mx::array>& scale, const std::optional<mx::array>& shift,
               float eps, bool rms, float offset) {
  NormOptions options{.rms = rms, .scaled = scale.has_value(), .shifted = shift.has_value(), .eps = eps, .offset = offset,
                      .groups = 1};
  Arrays inputs{ready(x)};
  for (const auto& one : {scale, shift}) {
    if (one) {
      options.groups = std::max<int64_t>(options.groups, one->size() / std::max(x.shape(-1), 1));
    }
  }
  require(options.groups == 1 || options.groups == x.shape(0), "norm: scale and shift must be (width,) or (batch, 1, width)");
  for (const auto& one : {scale, shift}) {
    if (one) {
      const bool fits = one->size() == size_t(options.groups) * x.shape(-1);
      inputs.push_back(ready(fits ? *one : mx::broadcast_to(mx::reshape(*one, {-1, x.shape(-1)}), {int(options.groups), x.shape(-1)})));
    }
  }
  return Norm(options).apply(inputs)[0];
}

}  // namespace mflux
