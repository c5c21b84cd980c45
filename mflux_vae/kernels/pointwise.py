"""Activations. On a CPU each, and each gradient, is one or two passes over a rational function (see `fusion`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx

from mflux_vae import runtime
from mflux_vae.kernels.fusion import fused
from mflux_vae.overriding import pointwise

_custom_function: Any = mx.custom_function  # MLX's stubs say that calling one gives an `object`


@pointwise
def relu(x: mx.array) -> mx.array:
    """max(x, 0)."""
    return mx.maximum(x, 0)


@pointwise
def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return _silu(x) if runtime.is_cpu() else x * mx.sigmoid(x)


@pointwise
def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU."""
    return _quick_gelu(x) if runtime.is_cpu() else x * mx.sigmoid(1.702 * x)


@pointwise
def gelu(x: mx.array) -> mx.array:
    """Exact GELU, x * Phi(x)."""
    wide = x.astype(mx.float32)
    return (wide * (1 + mx.erf(wide * 0.7071067811865476)) * 0.5).astype(x.dtype)


@pointwise
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in the tanh approximation (`gelu_new` of transformers, `gelu-approximate` of diffusers)."""
    return _gelu_tanh(x) if runtime.is_cpu() else 0.5 * x * (1 + mx.tanh(_gelu_argument(x)))


@pointwise
def tanh(x: mx.array) -> mx.array:
    """Hyperbolic tangent."""
    return _tanh(x) if runtime.is_cpu() else mx.tanh(x)


@pointwise
def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x))."""
    return _sigmoid(x) if runtime.is_cpu() else mx.sigmoid(x)


# tanh(x / 2) / 2 = x P(x^2) / Q(x^2), relative error 9e-9 up to 16.5, where it is 1/2 in float32: coefficients fitted
# by iteratively reweighted least squares. All activations are this function; its halves save operations.
_ALL = 16.5
_P = (0.249999998, 0.00839312709, 5.5514598e-05, 8.42691989e-08, 1.43986541e-11)
_Q = (1.0, 0.116905822, 0.00163088454, 5.28156796e-06, 3.2550131e-09)

_GELU_SCALE, _GELU_CUBE = 0.7978845608028654, 0.044715
"""sqrt(2 / pi) and the cubic coefficient of Hendrycks and Gimpel 2016."""

Pointwise: TypeAlias = Callable[[mx.array], mx.array]


def _sum(c: tuple[float, ...], square: mx.array, fourth: mx.array) -> mx.array:
    """A polynomial of degree four in the square."""
    return (c[0] + c[1] * square) + fourth * ((c[2] + c[3] * square) + c[4] * fourth)


def _fraction(x: mx.array) -> tuple[mx.array, mx.array]:
    """P(x^2) and Q(x^2)."""
    square = x * x
    fourth = square * square
    return _sum(_P, square, fourth), _sum(_Q, square, fourth)


def _half_tanh(x: mx.array) -> mx.array:
    """tanh(x / 2) / 2."""
    p, q = _fraction(x)
    t = mx.where(x > _ALL, 0.5, x * p / q)
    return mx.where(x < -_ALL, -0.5, t)


def _silu_value(x: mx.array) -> mx.array:
    """x / 2 + |x| tanh(|x| / 2) / 2: one comparison less."""
    p, q = _fraction(x)
    size = mx.abs(x)
    return 0.5 * x + mx.where(size > _ALL, 0.5 * size, (x * x) * p / q)


def _silu_slope(x: mx.array, y: mx.array) -> mx.array:
    sigmoid = mx.where(mx.abs(x) < 1e-30, 0.5, y / x)
    return sigmoid + y * (1 - sigmoid)


def _quick_gelu_value(x: mx.array) -> mx.array:
    return _silu_value(1.702 * x) * (1 / 1.702)


def _quick_gelu_slope(x: mx.array, _y: mx.array) -> mx.array:
    x = 1.702 * x
    return _silu_slope(x, _silu_value(x))  # y times 1.702 has another rounding error, which x would magnify


def _gelu_argument(x: mx.array) -> mx.array:
    return _GELU_SCALE * (x + _GELU_CUBE * (x * x) * x)


def _gelu_tanh_value(x: mx.array) -> mx.array:
    return x * (0.5 + _half_tanh(2 * _gelu_argument(x)))


def _gelu_tanh_slope(x: mx.array, _y: mx.array) -> mx.array:
    t = _half_tanh(2 * _gelu_argument(x))
    return (0.5 + t) + x * (1 - 4 * (t * t)) * (0.5 * _GELU_SCALE + 1.5 * _GELU_SCALE * _GELU_CUBE * (x * x))


def _tanh_value(x: mx.array) -> mx.array:
    return 2 * _half_tanh(2 * x)


def _tanh_slope(_x: mx.array, y: mx.array) -> mx.array:
    return 1 - y * y


def _sigmoid_value(x: mx.array) -> mx.array:
    return 0.5 + _half_tanh(x)


def _sigmoid_slope(_x: mx.array, y: mx.array) -> mx.array:
    return y * (1 - y)


def _differentiable(value: Pointwise, slope: Callable[[mx.array, mx.array], mx.array]) -> Pointwise:
    """A function of each element with its derivative, given (x, value), both in float32 whatever the dtype."""

    @fused
    def forward(x: mx.array) -> mx.array:
        return value(x.astype(mx.float32)).astype(x.dtype)

    @fused
    def backward(cotangent: mx.array, x: mx.array, y: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        y = y if y.dtype == mx.float32 else value(wide)  # half a precision's y is too coarse
        return (cotangent.astype(mx.float32) * slope(wide, y)).astype(x.dtype)

    @_custom_function
    def function(x: mx.array) -> mx.array:
        return forward(x)

    @function.vjp
    def function_vjp(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
        return backward(cotangent, x, y)

    return function


_silu = _differentiable(_silu_value, _silu_slope)
_quick_gelu = _differentiable(_quick_gelu_value, _quick_gelu_slope)
_gelu_tanh = _differentiable(_gelu_tanh_value, _gelu_tanh_slope)
_tanh = _differentiable(_tanh_value, _tanh_slope)
_sigmoid = _differentiable(_sigmoid_value, _sigmoid_slope)
