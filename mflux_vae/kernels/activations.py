"""Activations, computed in float32 in one pass over memory.

On a CPU they are compiled rational functions (see `cpu.fusion`), elsewhere compiled formulas (see `gpu_fusion`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx

from mflux_vae.kernels.cpu.fusion import fused
from mflux_vae.kernels.cpu.parallel import can_fuse
from mflux_vae.kernels.gpu_fusion import widened
from mflux_vae.kernels.overrides import pointwise
from mflux_vae.runtime import device

_custom_function: Any = mx.custom_function  # MLX's stubs type its result as `object`


@pointwise
def relu(x: mx.array) -> mx.array:
    """max(x, 0)."""
    return mx.maximum(x, 0)


@pointwise
def leaky_relu(x: mx.array, slope: float) -> mx.array:
    """max(x, slope * x) for 0 < slope < 1."""
    return mx.maximum(x, slope * x)


@pointwise
def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return _silu(x) if device.is_cpu() else _silu_gpu(x)


@pointwise
def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU."""
    return _quick_gelu(x) if device.is_cpu() else _quick_gelu_gpu(x)


@pointwise
def gelu(x: mx.array) -> mx.array:
    """Exact GELU, x * Phi(x)."""
    if not device.is_cpu():
        return _gelu_gpu(x)
    x32 = x.astype(mx.float32)
    return (x32 * (1 + mx.erf(x32 * 0.7071067811865476)) * 0.5).astype(x.dtype)


@pointwise
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in the tanh approximation (`gelu_new` of transformers, `gelu-approximate` of diffusers)."""
    return _gelu_tanh(x) if device.is_cpu() else _gelu_tanh_gpu(x)


@pointwise
def tanh(x: mx.array) -> mx.array:
    """Hyperbolic tangent."""
    return _tanh(x) if device.is_cpu() else _tanh_gpu(x)


@pointwise
def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x))."""
    return _sigmoid(x) if device.is_cpu() else _sigmoid_gpu(x)


# tanh(x / 2) / 2 = x P(x^2) / Q(x^2), with relative error 9e-9 up to x = 16.5, where float32 rounds it to 1/2.
# Coefficients fitted by iteratively reweighted least squares. All activations build on this function.
_SATURATION = 16.5
_P = (0.249999998, 0.00839312709, 5.5514598e-05, 8.42691989e-08, 1.43986541e-11)
_Q = (1.0, 0.116905822, 0.00163088454, 5.28156796e-06, 3.2550131e-09)

# tanh(0.8 (x + 0.04 x^3)) / 2, the t of GELU, fitted in the same way: relative error 7e-9 up to x = 5.6.
_GELU_SATURATION = 5.6
_GELU_P = (0.39894233, 0.0300579123, 0.00363138212, 0.000131906771, 7.18650784e-06, 2.53269119e-08)
_GELU_Q = (1.0, 0.242836514, 0.0242021724, 0.00129227792, 7.59355263e-05, 1.36239927e-06)

_QUICK_SCALE = 1.702
_QUICK_P = tuple(c * _QUICK_SCALE ** (2 * i + 1) for i, c in enumerate(_P))
_QUICK_Q = tuple(c * _QUICK_SCALE ** (2 * i) for i, c in enumerate(_Q))

_GELU_SCALE, _GELU_CUBE = 0.7978845608028654, 0.044715
"""sqrt(2 / pi) and the cubic coefficient of Hendrycks and Gimpel 2016."""


Pointwise: TypeAlias = Callable[[mx.array], mx.array]


def _polynomial(c: Sequence[float], square: mx.array, fourth: mx.array) -> mx.array:
    """Polynomial of degree four or five in x^2, summed as a tree (Estrin)."""
    last = c[4] if len(c) == 5 else c[4] + c[5] * square
    return (c[0] + c[1] * square) + fourth * ((c[2] + c[3] * square) + fourth * last)


def _rational(x: mx.array) -> tuple[mx.array, mx.array]:
    """P(x^2) and Q(x^2)."""
    square = x * x
    fourth = square * square
    return _polynomial(_P, square, fourth), _polynomial(_Q, square, fourth)


def _half_tanh_fused(x: mx.array) -> mx.array:
    """tanh(x / 2) / 2 for compiled formulas, where comparisons are cheap and `mx.clip` is not."""
    p, q = _rational(x)
    t = mx.where(x > _SATURATION, 0.5, x * p / q)
    return mx.where(x < -_SATURATION, -0.5, t)


def _half_tanh(x: mx.array) -> mx.array:
    """tanh(x / 2) / 2 without compilation, where a comparison costs fifteen products and `mx.clip` two."""
    x = mx.clip(x, -_SATURATION, _SATURATION)
    p, q = _rational(x)
    return x * p / q


def _gated(x: mx.array, p: Sequence[float], q: Sequence[float], saturation: float) -> mx.array:
    """x (1/2 + t(x)) for an odd t(x) = x P(x^2) / Q(x^2) that equals 1/2 above `saturation`; one comparison."""
    square, size = x * x, mx.abs(x)
    fourth = square * square
    t = square * _polynomial(p, square, fourth) / _polynomial(q, square, fourth)
    return 0.5 * x + mx.where(size > saturation, 0.5 * size, t)


def _gelu_argument(x: mx.array) -> mx.array:
    return _GELU_SCALE * (x + _GELU_CUBE * (x * x) * x)


# Values and derivatives: the backward pass then needs one product.


def _silu_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    s = 0.5 + _half_tanh(x)
    y = x * s
    return y, s + y * (1 - s)


def _quick_gelu_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    y, slope = _silu_and_slope(_QUICK_SCALE * x)
    return (1 / _QUICK_SCALE) * y, slope


def _gelu_tanh_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    near = mx.clip(x, -5.0, 5.0)  # t is 1/2 beyond; without the clip x^3 would magnify its rounding error
    square = near * near
    t = _half_tanh((2 * _GELU_SCALE) * near * (1 + _GELU_CUBE * square))
    s = 0.5 + t
    return x * s, s + near * (1 - 4 * (t * t)) * (0.5 * _GELU_SCALE + (1.5 * _GELU_SCALE * _GELU_CUBE) * square)


def _tanh_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    y = 2 * _half_tanh(2 * x)
    return y, 1 - y * y


def _sigmoid_and_slope(x: mx.array) -> tuple[mx.array, mx.array]:
    y = 0.5 + _half_tanh(x)
    return y, y * (1 - y)


def _differentiable(value: Pointwise, value_and_slope: Callable[[mx.array], tuple[mx.array, mx.array]]) -> Pointwise:
    """Build an element-wise function, computed in float32: compiled if evaluated eagerly, else differentiable."""

    @fused
    def compiled(x: mx.array) -> mx.array:
        return value(x.astype(mx.float32)).astype(x.dtype)

    @_custom_function
    def unfused(x: mx.array) -> tuple[mx.array, mx.array]:
        y, slope = value_and_slope(x.astype(mx.float32))
        return y.astype(x.dtype), slope

    @unfused.vjp
    def unfused_vjp(x: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
        return (cotangents[0].astype(mx.float32) * outputs[1]).astype(x.dtype)

    def function(x: mx.array) -> mx.array:
        y: mx.array = compiled(x) if can_fuse(x) else unfused(x)[0]
        return y

    return function


_silu = _differentiable(lambda x: _gated(x, _P, _Q, _SATURATION), _silu_and_slope)
_quick_gelu = _differentiable(
    lambda x: _gated(x, _QUICK_P, _QUICK_Q, _SATURATION / _QUICK_SCALE), _quick_gelu_and_slope
)
_gelu_tanh = _differentiable(lambda x: _gated(x, _GELU_P, _GELU_Q, _GELU_SATURATION), _gelu_tanh_and_slope)
_tanh = _differentiable(lambda x: 2 * _half_tanh_fused(2 * x), _tanh_and_slope)
_sigmoid = _differentiable(lambda x: 0.5 + _half_tanh_fused(x), _sigmoid_and_slope)

_silu_gpu = widened(lambda x: x * mx.sigmoid(x), shapeless=True)
_quick_gelu_gpu = widened(lambda x: x * mx.sigmoid(_QUICK_SCALE * x), shapeless=True)
_gelu_gpu = widened(lambda x: x * (1 + mx.erf(x * 0.7071067811865476)) * 0.5, shapeless=True)
_tanh_gpu = widened(lambda x: mx.tanh(x), shapeless=True)
_sigmoid_gpu = widened(lambda x: mx.sigmoid(x), shapeless=True)
_gelu_tanh_gpu = widened(lambda x: 0.5 * x * (1 + mx.tanh(_gelu_argument(x))), shapeless=True)
