"""Activations, computed in float32 in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mflux_vae.kernels.cpu.extension import native
from mflux_vae.kernels.gpu_fusion import widened
from mflux_vae.kernels.overrides import pointwise


def _activation(name: str, formula: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """The extension's activation of this name, or the formula."""
    compiled = widened(formula, shapeless=True)

    def call(x: mx.array) -> mx.array:
        if (cpu := native()) is None:
            return compiled(x)
        y: mx.array = cpu.activate(x, getattr(cpu.Activation, name)).astype(x.dtype)
        return y

    return call


_GELU_SCALE, _GELU_CUBE = 0.7978845608028654, 0.044715
"""sqrt(2 / pi) and the cubic coefficient of Hendrycks and Gimpel 2016."""


def _gelu_formula(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x * 0.7071067811865476)) * 0.5


def _gelu_tanh_formula(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(_GELU_SCALE * (x + _GELU_CUBE * (x * x) * x)))


_silu = _activation("silu", lambda x: x * mx.sigmoid(x))
_quick_gelu = _activation("quick_gelu", lambda x: x * mx.sigmoid(1.702 * x))
_gelu = _activation("gelu", _gelu_formula)
_gelu_tanh = _activation("gelu_tanh", _gelu_tanh_formula)
_tanh = _activation("tanh", lambda x: mx.tanh(x))
_sigmoid = _activation("sigmoid", lambda x: mx.sigmoid(x))


@pointwise
def relu(x: mx.array) -> mx.array:
    """max(x, 0)."""
    return mx.maximum(x, 0)


@pointwise
def leaky_relu(x: mx.array, slope: float) -> mx.array:
    """max(x, slope * x) for 0 < slope < 1."""
    if (cpu := native()) is None:
        return mx.maximum(x, slope * x)
    y: mx.array = cpu.activate(x, cpu.Activation.leaky_relu, slope).astype(x.dtype)
    return y


@pointwise
def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return _silu(x)


@pointwise
def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU."""
    return _quick_gelu(x)


@pointwise
def gelu(x: mx.array) -> mx.array:
    """Exact GELU, x * Phi(x)."""
    return _gelu(x)


@pointwise
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in the tanh approximation (`gelu_new` of transformers, `gelu-approximate` of diffusers)."""
    return _gelu_tanh(x)


@pointwise
def tanh(x: mx.array) -> mx.array:
    """Hyperbolic tangent."""
    return _tanh(x)


@pointwise
def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x))."""
    return _sigmoid(x)


_GATED = {
    "silu": widened(lambda gate, other: gate * mx.sigmoid(gate) * other, shapeless=True),
    "gelu": widened(lambda gate, other: _gelu_formula(gate) * other, shapeless=True),
    "gelu_tanh": widened(lambda gate, other: _gelu_tanh_formula(gate) * other, shapeless=True),
}


def glu(
    gate: mx.array, other: mx.array | None = None, *, activation: str = "silu", gate_first: bool = True
) -> mx.array:
    """activation(gate) * other (Shazeer 2020).

    Args:
        gate: (..., D); without `other` (..., 2 D), of which `gate_first` says which half is the gate.
        activation: silu, gelu or gelu_tanh.
    """
    if (cpu := native()) is not None:
        y: mx.array = cpu.glu(gate, other, getattr(cpu.Activation, activation), gate_first).astype(gate.dtype)
        return y
    if other is None:
        halves = mx.split(gate, 2, axis=-1)
        gate, other = halves if gate_first else halves[::-1]
    return _GATED[activation](gate, other)
