"""Convolution, normalisation, activation and attention: what layers call, fast on every device, one definition each.

Metal and CUDA use MLX's own operations. On a CPU MLX's convolution copies patches through memory, its gradients do
so several times over, and its transcendental functions are scalar; the forms below avoid that. Arrays are NHWC.
Every function answers in the dtype of its (first) argument; half precision is widened where it would lose more than
its own rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import mlx.core as mx

from mflux_vae.overriding import overridable, pointwise
from mflux_vae.runtime import is_cpu

Padding: TypeAlias = int | tuple[tuple[int, int], tuple[int, int]]

# Where a product per kernel tap beats one product over gathered patches, measured with MKL and OpenBLAS on x86-64.
_SHIFTED_MAX_CHANNELS = 256
_SHIFTED_MIN_WIDTH = 12
_PIXELS_SUMMED_AT_ONCE = 4096
_SCORES_AT_ONCE = 1 << 23
_FUSED_MAX_WIDTH = 128
"""MLX's attention on Metal and CUDA makes no scores up to this width of a head."""

_custom_function: Any = mx.custom_function  # MLX's stubs say that calling one gives an `object`


@overridable
def conv2d(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, *, stride: int = 1, padding: Padding = 0
) -> mx.array:
    """2-D convolution (cross-correlation).

    Args:
        x: (B, H, W, C).
        weight: (O, kh, kw, C).
        bias: (O,) or None.
        stride: the same in both directions; above 2 it is MLX's own convolution on every device.
        padding: zeros around the image: one number, or ((top, bottom), (left, right)).

    Returns:
        (B, (H + top + bottom - kh) // stride + 1, (W + left + right - kw) // stride + 1, O).

    Raises:
        ValueError: the kernel is larger than the padded image, or their channels differ.
    """
    (top, bottom), (left, right) = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    height, width = x.shape[1] + top + bottom, x.shape[2] + left + right
    if height < weight.shape[1] or width < weight.shape[2] or x.shape[3] != weight.shape[3]:
        raise ValueError(
            f"no convolution of {x.shape} (B, H, W, C), {height} x {width} when padded, "
            f"with a kernel {weight.shape} (O, kh, kw, C)"
        )
    native = not is_cpu() or stride > 2
    if native and top == bottom and left == right:
        y = mx.conv2d(x, weight, stride=stride, padding=(top, left))
        return y if bias is None else y + bias
    if top or bottom or left or right:
        x = mx.pad(x, [(0, 0), (top, bottom), (left, right), (0, 0)])
    if native:
        y = mx.conv2d(x, weight, stride=stride)
    else:
        y = _conv_valid(*(_space_to_depth(x, weight) if stride == 2 else (x, weight)))
    return y if bias is None else y + bias


def _space_to_depth(x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
    """Rewrite a stride-2 convolution as a stride-1 one over 2x2 blocks; MLX's own input gradient is 50 times slower."""
    batch, height, width, channels = x.shape
    out, kh, kw, _ = weight.shape
    # rows and columns that no window reaches are cut, those that complete a block are added
    blocks_h, blocks_w = (height - kh) // 2 + (kh + 1) // 2, (width - kw) // 2 + (kw + 1) // 2
    x = x[:, : 2 * blocks_h, : 2 * blocks_w]
    x = mx.pad(x, [(0, 0), (0, 2 * blocks_h - x.shape[1]), (0, 2 * blocks_w - x.shape[2]), (0, 0)])
    x = x.reshape(batch, blocks_h, 2, blocks_w, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    weight = mx.pad(weight, [(0, 0), (0, kh % 2), (0, kw % 2), (0, 0)])
    kh, kw = (kh + 1) // 2, (kw + 1) // 2
    weight = weight.reshape(out, kh, 2, kw, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, blocks_h, blocks_w, 4 * channels), weight.reshape(out, kh, kw, 4 * channels)


@_custom_function
def _conv_valid(x: mx.array, weight: mx.array) -> mx.array:
    """Stride-1 convolution without padding, on the CPU: a product per kernel tap, or one over gathered patches."""
    batch, height, width, channels = x.shape
    out, kh, kw, _ = weight.shape
    if kh == kw == 1:
        return x @ weight.reshape(out, channels).T
    out_h, out_w = height - kh + 1, width - kw + 1
    if channels > _SHIFTED_MAX_CHANNELS or width < _SHIFTED_MIN_WIDTH:
        patches = _patches(x, kh, kw)
        return (patches @ weight.reshape(out, -1).T).reshape(batch, out_h, out_w, out)
    # Shifting a kernel tap is an offset into the flattened image: rows that wrap around an edge are never read back.
    flat = x.reshape(-1, channels)
    rows = flat.shape[0] - (kh - 1) * width - (kw - 1)
    y = flat[:rows] @ weight[:, 0, 0].T
    for tap in range(1, kh * kw):
        i, j = divmod(tap, kw)
        start = i * width + j
        y = mx.addmm(y, flat[start : start + rows], weight[:, i, j].T)
    return mx.as_strided(y, (batch, out_h, out_w, out), (height * width * out, width * out, out, 1))


@_conv_valid.vjp
def _conv_valid_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _y: mx.array) -> tuple[mx.array, mx.array]:
    """Gradients of `_conv_valid`: the input's is a convolution again, the weight's one product over patches."""
    x, weight = primals
    out, kh, kw, _ = weight.shape
    margin = mx.pad(cotangent, [(0, 0), (kh - 1, kh - 1), (kw - 1, kw - 1), (0, 0)])
    grad_x = _conv_valid(margin, weight[:, ::-1, ::-1].transpose(3, 1, 2, 0))
    grad_w = cotangent.reshape(-1, out).T @ _patches(x, kh, kw)
    return grad_x, grad_w.reshape(weight.shape)


def _patches(x: mx.array, kh: int, kw: int) -> mx.array:
    """(B, H, W, C) -> (B * out_h * out_w, kh * kw * C): every window, one row each."""
    batch, height, width, channels = x.shape
    shape = (batch, height - kh + 1, width - kw + 1, kh, kw * channels)
    row = width * channels
    strides = (height * row, row, channels, row, 1)
    return mx.as_strided(mx.contiguous(x), shape, strides).reshape(-1, kh * kw * channels)


@overridable
def group_norm(x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Group normalisation over (H, W) and the channels of a group, as torch orders them (Wu and He 2018).

    Args:
        x: (B, ..., C), normalised over every axis between batch and channels.
        groups: a divisor of C.
        weight, bias: (C,).
    """
    return group_norm_apply(x, *group_norm_statistics(x, groups), weight, bias, eps)


def group_norm_statistics(x: mx.array, groups: int) -> tuple[mx.array, mx.array]:
    """Mean and variance of each group, per sample, spread over its channels: both (B, C), float32.

    Two passes: reductions over pixels, then over the few channels of a group.
    """
    batch, channels, width = x.shape[0], x.shape[-1], x.shape[-2]
    x = x.reshape(batch, -1, channels).astype(mx.float32)
    mean = _over_group(_over_pixels(x, width), groups)
    return mean, _over_group(_over_pixels(mx.square(x - mean[:, None]), width), groups)


def group_norm_apply(
    x: mx.array, mean: mx.array, variance: mx.array, weight: mx.array, bias: mx.array, eps: float
) -> mx.array:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32; x: (B, ..., C), the statistics (B, C)."""
    spread = (-1, *(1,) * (x.ndim - 2), x.shape[-1])
    scale = (mx.rsqrt(variance + eps) * weight).reshape(spread)
    return ((x.astype(mx.float32) - mean.reshape(spread)) * scale + bias).astype(x.dtype)


def _over_pixels(x: mx.array, width: int) -> mx.array:
    """Mean over axis 1, many pixels row by row: MLX's CPU adds one after the other, and rounds as often."""
    batch, pixels, channels = x.shape
    if pixels > _PIXELS_SUMMED_AT_ONCE:
        x = mx.mean(x.reshape(batch, -1, width, channels), axis=2)
    return mx.mean(x, axis=1)


def _over_group(values: mx.array, groups: int) -> mx.array:
    """Mean over each group's channels, spread back over them. (B, C) -> (B, C)."""
    batch, channels = values.shape
    mean = mx.mean(values.reshape(batch, groups, -1), axis=-1, keepdims=True)
    return mx.broadcast_to(mean, (batch, groups, channels // groups)).reshape(batch, channels)


@pointwise
def relu(x: mx.array) -> mx.array:
    """max(x, 0)."""
    return mx.maximum(x, 0)


@pointwise
def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return _silu(x) if is_cpu() else x * mx.sigmoid(x)


@pointwise
def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU."""
    return silu(1.702 * x) / 1.702


@pointwise
def gelu(x: mx.array) -> mx.array:
    """Exact GELU, x * Phi(x)."""
    wide = x.astype(mx.float32)
    return (wide * (1 + mx.erf(wide * 0.7071067811865476)) * 0.5).astype(x.dtype)


@pointwise
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in the tanh approximation (`gelu_new` of transformers, `gelu-approximate` of diffusers)."""
    return _gelu_tanh(x) if is_cpu() else 0.5 * x * (1 + mx.tanh(_gelu_argument(x)))


@pointwise
def tanh(x: mx.array) -> mx.array:
    """Hyperbolic tangent."""
    return _tanh(x) if is_cpu() else mx.tanh(x)


@pointwise
def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x))."""
    return _sigmoid(x) if is_cpu() else mx.sigmoid(x)


# On a CPU MLX's exp and tanh are scalar calls, and every operation of a formula is a pass over memory. Below, each
# activation and each gradient is one fused pass over a rational function.

# Minimax approximation of tanh, degree 13 over 6: exact to float32 rounding within the clamp, 1 beyond it.
# Its smallest coefficients vanish in half precision.
_TANH_CLAMP = 7.90531110763549805
_TANH_ODD = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)

_GELU_SCALE, _GELU_CUBE = 0.7978845608028654, 0.044715
"""sqrt(2 / pi) and the cubic coefficient of Hendrycks and Gimpel 2016."""

Pointwise: TypeAlias = Callable[..., mx.array]


def _rational_tanh(x: mx.array) -> mx.array:
    x = mx.clip(x, -_TANH_CLAMP, _TANH_CLAMP)
    square = x * x
    return x * _horner(square, _TANH_ODD) / _horner(square, _TANH_EVEN)


def _horner(x: mx.array, coefficients: tuple[float, ...]) -> mx.array:
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def _gelu_argument(x: mx.array) -> mx.array:
    return _GELU_SCALE * (x + _GELU_CUBE * x * x * x)


def _tanh_slope(x: mx.array) -> mx.array:
    t = _rational_tanh(x)
    return 1 - t * t


def _sigmoid_value(x: mx.array) -> mx.array:
    return 0.5 * _rational_tanh(0.5 * x) + 0.5


def _sigmoid_slope(x: mx.array) -> mx.array:
    s = _sigmoid_value(x)
    return s * (1 - s)


def _silu_value(x: mx.array) -> mx.array:
    return x * _sigmoid_value(x)


def _silu_slope(x: mx.array) -> mx.array:
    s = _sigmoid_value(x)
    return s * (1 + x * (1 - s))


def _gelu_tanh_value(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + _rational_tanh(_gelu_argument(x)))


def _gelu_tanh_slope(x: mx.array) -> mx.array:
    t = _rational_tanh(_gelu_argument(x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (_GELU_SCALE * (1 + 3 * _GELU_CUBE * x * x))


def _pointwise(value: Pointwise, slope: Pointwise) -> Pointwise:
    """A function of each element with its derivative, both in float32 whatever the dtype, each in one pass."""

    def forward(x: mx.array) -> mx.array:
        return value(x.astype(mx.float32)).astype(x.dtype)

    def backward(cotangent: mx.array, x: mx.array) -> mx.array:
        return (cotangent.astype(mx.float32) * slope(x.astype(mx.float32))).astype(x.dtype)

    @cache
    def fused() -> tuple[Pointwise, Pointwise]:
        """Compiled where the machine can, which is tried once: MLX does without a compiler, not with a broken one."""
        compiled = mx.compile(forward, shapeless=True), mx.compile(backward, shapeless=True)
        trial = mx.zeros((2,))
        try:
            mx.eval(compiled[0](trial), compiled[1](trial, trial))
        except RuntimeError:
            return forward, backward
        return compiled

    @_custom_function
    def function(x: mx.array) -> mx.array:
        return fused()[0](x)

    @function.vjp
    def function_vjp(x: mx.array, cotangent: mx.array, _y: mx.array) -> mx.array:
        return fused()[1](cotangent, x)

    return function


_tanh = _pointwise(_rational_tanh, _tanh_slope)
_sigmoid = _pointwise(_sigmoid_value, _sigmoid_slope)
_silu = _pointwise(_silu_value, _silu_slope)
_gelu_tanh = _pointwise(_gelu_tanh_value, _gelu_tanh_slope)


def softmax(x: mx.array, axis: int = -1) -> mx.array:
    """Softmax, summed in float32 whatever the dtype."""
    return mx.softmax(x, axis=axis, precise=True)


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None) -> mx.array:
    """Scaled dot-product attention, some queries after the other where the scores of all would take much memory.

    Args:
        q: (B, heads, N, d); k, v: (B, heads, M, d).
        scale: factor on the scores, usually d ** -0.5.
        mask: additive, broadcastable to (B, heads, N, M); None for none.

    Returns:
        (B, heads, N, d).
    """
    queries = max(_SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]), 1)
    materialised = is_cpu() or q.shape[3] > _FUSED_MAX_WIDTH
    if queries >= q.shape[2] or not materialised:
        return _attention(q, k, v, scale, mask)
    parts = []
    for start in range(0, q.shape[2], queries):
        here = slice(start, start + queries)
        part_of_mask = mask if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., here, :]
        parts.append(_attention(q[:, :, here], k, v, scale, part_of_mask))
        try:
            mx.eval(parts[-1])
        except ValueError:  # inside a trace nothing can be computed yet, and parts would save nothing
            return _attention(q, k, v, scale, mask)
    return mx.concatenate(parts, axis=2)


def _attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    if not is_cpu():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    scores = (q * scale) @ k.swapaxes(-1, -2)
    return softmax(scores if mask is None else scores + mask) @ v


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019)."""
    if not is_cpu():
        return mx.fast.rms_norm(x, weight, eps)
    wide = x.astype(mx.float32)
    y = (wide * mx.rsqrt(mx.mean(mx.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return y if weight is None else y * weight


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """Layer normalisation over the last axis; weight and bias may be absent."""
    return mx.fast.layer_norm(x, weight, bias, eps)
