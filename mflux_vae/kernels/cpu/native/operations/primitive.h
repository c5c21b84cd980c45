// What the primitives of this extension share.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "compute/pool.h"
#include "compute/workspace.h"
#include "isa/kernels.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"

namespace mflux {

namespace mx = mlx::core;
using Arrays = std::vector<mx::array>;

constexpr size_t LARGE = 1 << 20;  // bytes of an output that is allocated when earlier operations are done

inline mx::Stream cpu() { return mx::default_stream(mx::Device::cpu); }

/// Throws unless `fits`: kernels trust the shapes.
inline void require(bool fits, const char* message) {
  if (!fits) {
    throw std::invalid_argument(message);
  }
}

/// Copies a view of 4-byte numbers into rows.
class ViewCopy {
 public:
  explicit ViewCopy(const mx::array& x) : size_(x.size()), from_(x.data<float>()) {
    for (size_t i = 0; i < x.ndim(); i++) {  // axes that are one in memory become one
      const int64_t length = x.shape(i), step = x.strides(i);
      if (!lengths_.empty() && steps_.back() == length * step) {
        lengths_.back() *= length;
        steps_.back() = step;
      } else if (length != 1) {
        lengths_.push_back(length);
        steps_.push_back(step);
      }
    }
  }

  Floats operator()() const {
    Floats rows = floats(size_);
    const int64_t outer = lengths_[0], inner = size_ / outer;
    parallel_for(outer, 1 + (1 << 14) / inner, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        copy(1, from_ + i * steps_[0], rows.get() + i * inner, inner);
      }
    });
    return rows;
  }

 private:
  void copy(size_t axis, const float* from, float* to, int64_t size) const {
    if (axis == lengths_.size()) {
      *to = *from;
      return;
    }
    const int64_t length = lengths_[axis], step = steps_[axis], inner = size / length;
    if (inner > 1) {
      for (int64_t i = 0; i < length; i++) {
        copy(axis + 1, from + i * step, to + i * inner, inner);
      }
    } else if (step == 1) {
      std::copy_n(from, length, to);
    } else {
      for (int64_t i = 0; i < length; i++) {
        to[i] = from[i * step];
      }
    }
  }

  int64_t size_;
  const float* from_;
  std::vector<int64_t> lengths_, steps_;
};

/// A primitive that computes on a CPU in float32. Views among its inputs are copied into rows for the computation.
class CpuPrimitive : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    if (outputs[0].nbytes() >= LARGE) {  // MLX allocates up to a hundred operations ahead of those that run
      mx::synchronize(stream());
    }
    auto& encoder = mx::cpu::get_command_encoder(stream());
    std::vector<const float*> in;
    std::vector<float*> out;
    std::vector<size_t> sizes;
    std::vector<std::pair<size_t, ViewCopy>> views;
    for (const auto& x : inputs) {
      encoder.set_input_array(x);
      if (x.size() > 1 && !x.flags().row_contiguous) {
        views.emplace_back(in.size(), x);
      }
      in.push_back(x.data<float>());
    }
    for (auto& y : outputs) {
      y.set_data(mx::allocator::malloc(y.nbytes()));
      use_huge_pages(y.data<float>(), y.nbytes());
      encoder.set_output_array(y);
      out.push_back(y.data<float>());
      sizes.push_back(y.size());
    }
    if (outputs[0].nbytes() >= LARGE) {
      limit_cache();
    }
    if (sizes[0] == 0) {  // sums over nothing
      encoder.dispatch([out = std::move(out), sizes = std::move(sizes)] {
        for (size_t i = 0; i < out.size(); i++) {
          std::fill_n(out[i], sizes[i], 0.f);
        }
      });
      return;
    }
    encoder.dispatch([in = std::move(in), out = std::move(out), views = std::move(views), work = bind(inputs)]() mutable {
      std::vector<Floats> copies;
      for (const auto& [input, view] : views) {
        in[input] = copies.emplace_back(view()).get();
      }
      work(in, out);
    });
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string(name()) + ": this primitive computes on a CPU only");
  }

  /// The same operation on other inputs.
  virtual Arrays apply(const Arrays& inputs) = 0;

  /// One call for each index of the mapped axis.
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    int count = 0;
    for (size_t i = 0; i < inputs.size(); i++) {
      if (axes[i] >= 0) {
        count = inputs[i].shape(axes[i]);
      }
    }
    require(count > 0, "mapped over an axis without elements");
    std::vector<Arrays> results;
    for (int index = 0; index < count; index++) {
      Arrays one;
      for (size_t i = 0; i < inputs.size(); i++) {
        one.push_back(axes[i] < 0 ? inputs[i] : mx::take(inputs[i], index, axes[i], stream()));
      }
      results.push_back(apply(one));
    }
    Arrays stacked;
    for (size_t i = 0; i < results[0].size(); i++) {
      Arrays each;
      for (const auto& result : results) {
        each.push_back(result[i]);
      }
      stacked.push_back(mx::stack(each, 0, stream()));
    }
    return {stacked, std::vector<int>(stacked.size(), 0)};
  }

 protected:
  using Work = std::function<void(const std::vector<const float*>&, const std::vector<float*>&)>;

  /// The computation for inputs of these shapes. It may be called on another thread, so it holds no arrays.
  virtual Work bind(const Arrays& inputs) = 0;
};

/// A primitive with options, named `Derived::NAME`. `Derived` implements `output_shapes`, `bind` and `vjp`.
template <class Derived, class Options>
class Operation : public CpuPrimitive {
 public:
  explicit Operation(Options options, mx::Stream s = cpu()) : CpuPrimitive(s), options_(std::move(options)) {}

  const char* name() const override { return Derived::NAME; }

  bool is_equivalent(const mx::Primitive& other) const override {
    return options_ == static_cast<const Operation&>(other).options_;
  }

  Arrays apply(const Arrays& inputs) override {
    const auto shapes = output_shapes(inputs);
    return mx::array::make_arrays(shapes, std::vector<mx::Dtype>(shapes.size(), mx::float32),
                                  std::make_shared<Derived>(options_, stream()), inputs);
  }

 protected:
  Options options_;
};

/// Those of `all` that `argnums` name.
inline Arrays select(const Arrays& all, const std::vector<int>& argnums) {
  Arrays wanted;
  for (int argument : argnums) {
    wanted.push_back(all[argument]);
  }
  return wanted;
}

/// A float32 array.
inline mx::array ready(const mx::array& x) { return x.dtype() == mx::float32 ? x : mx::astype(x, mx::float32); }

/// A row-contiguous array, for primitives that use the memory of their inputs: x itself where that is known before it is
/// evaluated, which spares an operation.
inline mx::array row_contiguous(const mx::array& x) {
  if (x.has_primitive() ? dynamic_cast<const CpuPrimitive*>(&x.primitive()) != nullptr
                        : !x.is_tracer() && x.is_available() && x.data_shared_ptr() && x.flags().row_contiguous) {
    return x;
  }
  return mx::contiguous(x);
}

/// Adds the arrays that are given, each `ready`.
inline void append(Arrays& inputs, std::initializer_list<std::optional<mx::array>> more) {
  for (const auto& one : more) {
    if (one) {
      inputs.push_back(ready(*one));
    }
  }
}

}  // namespace mflux
