// The Python module `_native`.

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "mlx/compile.h"
#include "operations/ops.h"

namespace nb = nanobind;
using namespace nb::literals;
using mflux::Activation;

NB_MODULE(_native, m) {
  const std::string version = nb::cast<std::string>(nb::module_::import_("mlx.core").attr("__version__"));
  if (version != MLX_BUILT_WITH || !nb::type<mflux::mx::array>()) {  // before anything of MLX is used
    throw nb::import_error(("it was built for MLX " MLX_BUILT_WITH ", this is " + version).c_str());
  }
  m.attr("API") = 2;  // as in extension.py
  if (!mflux::kernels()) {
    throw nb::import_error("this processor lacks AVX2");
  }
  nb::enum_<Activation>(m, "Activation")
      .value("none", Activation::none)
      .value("silu", Activation::silu)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("quick_gelu", Activation::quick_gelu)
      .value("sigmoid", Activation::sigmoid)
      .value("tanh", Activation::tanh)
      .value("leaky_relu", Activation::leaky_relu);
  nb::enum_<mflux::mx::CompileMode>(m, "CompileMode")
      .value("no_fuse", mflux::mx::CompileMode::no_fuse)
      .value("enabled", mflux::mx::CompileMode::enabled);
  m.def("set_compile_mode", &mflux::mx::set_compile_mode, "mode"_a);
  m.def("threads", &mflux::threads);
  m.def("fork", &mflux::fork, "x"_a);
  m.def("activate", &mflux::activate, "x"_a, "kind"_a, "slope"_a = 0.f);
  m.def("norm", &mflux::norm, "x"_a, "scale"_a.none(), "shift"_a.none(), "eps"_a, "rms"_a, "offset"_a = 0.f);
  m.def("glu", &mflux::glu, "gate"_a, "other"_a.none(), "kind"_a, "gate_first"_a = true);
  m.def("gated", &mflux::gated, "x"_a, "gate"_a, "y"_a);
  m.def("softmax", &mflux::softmax, "x"_a);
  m.def("attention", &mflux::attention, "q"_a, "k"_a, "v"_a, "scale"_a, "mask"_a.none() = nb::none());
  m.def("affine", &mflux::affine, "x"_a, "scale"_a.none(), "shift"_a.none(), "silu"_a);
  m.def("conv2d", &mflux::conv2d, "x"_a, "weight"_a, "bias"_a.none() = nb::none(), "residual"_a.none() = nb::none(),
        "scale"_a.none() = nb::none(), "shift"_a.none() = nb::none(), "silu"_a = false, "doubled"_a = false,
        "stride"_a = 1, "padding"_a = std::array<int, 4>{});
  m.def("linear", &mflux::linear, "x"_a, "weight"_a, "bias"_a.none() = nb::none());
  m.def("conv_transpose2d", &mflux::conv_transpose2d, "x"_a, "weight"_a, "bias"_a.none(), "stride"_a, "padding"_a,
        "size"_a);
  m.def("group_norm", &mflux::group_norm, "x"_a, "groups"_a, "scale"_a, "shift"_a, "eps"_a,
        "activation"_a = Activation::none, "slope"_a = 0.f);
  m.def("group_norm_affine", &mflux::group_norm_affine, "x"_a, "groups"_a, "scale"_a, "shift"_a, "eps"_a);
  m.def("batch_norm", &mflux::batch_norm, "x"_a, "scale"_a, "shift"_a, "eps"_a, "activation"_a = Activation::none,
        "slope"_a = 0.f);
  m.def("channel_sum", &mflux::channel_sum, "x"_a);
  m.def("norm_rotary", &mflux::norm_rotary, "parts"_a, "weights"_a, "cos"_a, "sin"_a, "eps"_a, "halves"_a = false);
  m.def("lora_linear", &mflux::lora_linear, "x"_a, "weight"_a, "bias"_a.none(), "lora"_a);
  m.def("quantized_linear", &mflux::quantized_linear, "x"_a, "weight"_a, "scales"_a, "biases"_a, "group_size"_a, "bits"_a,
        "bias"_a.none() = nb::none(), "lora"_a.none() = nb::none());
  m.def("sum_of_squares", &mflux::sum_of_squares, "arrays"_a);
  m.def("adamw", &mflux::adamw, "weights"_a, "gradients"_a, "m"_a, "v"_a, "scale"_a, "decay"_a, "rate"_a,
        "correction"_a, "beta1"_a, "beta2"_a, "eps"_a);
}
