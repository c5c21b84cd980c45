"""Convolution, normalisation, activation and attention: what layers call, fast on every device, one definition each.

Metal and CUDA use MLX's own operations. On a CPU MLX's convolution copies patches through memory, its gradients do
so several times over, and its transcendental functions are scalar; the forms below avoid that. Arrays are NHWC.
Every function answers in the dtype of its (first) argument; half precision is widened where it would lose more than
its own rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from mflux_vae.runtime import is_cpu

Padding = int | tuple[tuple[int, int], tuple[int, int]]

# Where a product per kernel tap beats one product over gathered patches, measured with MKL and OpenBLAS on x86-64.
_SHIFTED_MAX_CHANNELS = 256
_SHIFTED_MIN_WIDTH = 12

_custom_function: Any = mx.custom_function  # MLX's stubs say that calling one gives an `object`


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
    native = not is_cpu() or stride > 2
    if native and top == bottom and left == right:
        y = mx.conv2d(x, weight, stride=stride, padding=(top, left))
        return y if bias is None else y + bias
    if top or bottom or left or right:
        x = mx.pad(x, [(0, 0), (top, bottom), (left, right), (0, 0)])
    if x.shape[1] < weight.shape[1] or x.shape[2] < weight.shape[2] or x.shape[3] != weight.shape[3]:
        raise ValueError(f"no convolution of padded {x.shape} (B, H, W, C) with {weight.shape} (O, kh, kw, C)")
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


def group_norm(x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Group normalisation over (H, W) and the channels of a group, as torch orders them (Wu and He 2018).

    Statistics are two-pass, in float32: reductions over pixels, then over the few channels of a group.

    Args:
        x: (B, ..., C), normalised over every axis between batch and channels.
        groups: a divisor of C.
        weight, bias: (C,).
    """
    shape, dtype = x.shape, x.dtype
    batch, channels = shape[0], shape[-1]
    x = x.reshape(batch, -1, channels).astype(mx.float32)
    mean = _over_group(mx.mean(x, axis=1), groups)
    x = x - mean[:, None]
    variance = _over_group(mx.mean(mx.square(x), axis=1), groups)
    scale = mx.rsqrt(variance + eps) * weight
    return (x * scale[:, None] + bias).astype(dtype).reshape(shape)


def _over_group(values: mx.array, groups: int) -> mx.array:
    """Mean over each group's channels, spread back over them. (B, C) -> (B, C)."""
    batch, channels = values.shape
    mean = mx.mean(values.reshape(batch, groups, -1), axis=-1, keepdims=True)
    return mx.broadcast_to(mean, (batch, groups, channels // groups)).reshape(batch, channels)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU."""
    return x * sigmoid(1.702 * x)


def gelu(x: mx.array) -> mx.array:
    """Exact GELU, x * Phi(x)."""
    wide = x.astype(mx.float32)
    return (wide * (1 + mx.erf(wide * 0.7071067811865476)) * 0.5).astype(x.dtype)


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in the tanh approximation (`gelu_new` of transformers, `gelu-approximate` of diffusers)."""
    wide = x.astype(mx.float32)
    return (0.5 * wide * (1 + tanh(0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)))).astype(x.dtype)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x))."""
    return _sigmoid(x.astype(mx.float32)).astype(x.dtype) if is_cpu() else mx.sigmoid(x)


def tanh(x: mx.array) -> mx.array:
    """Hyperbolic tangent."""
    return _tanh(x.astype(mx.float32)).astype(x.dtype) if is_cpu() else mx.tanh(x)


# Rational minimax approximation of tanh, degree 13 over 6: exact to float32 rounding within the clamp, 1 beyond it.
# MLX's CPU exp and tanh are scalar calls: five times slower than these multiplications when they are fused.
# Its smallest coefficients vanish in half precision: callers pass float32.
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


def _rational_tanh(x: mx.array) -> mx.array:
    x = mx.clip(x, -_TANH_CLAMP, _TANH_CLAMP)
    square = x * x
    odd, even = _horner(square, _TANH_ODD), _horner(square, _TANH_EVEN)
    return x * odd / even


def _horner(x: mx.array, coefficients: tuple[float, ...]) -> mx.array:
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def _rational_sigmoid(x: mx.array) -> mx.array:
    return _rational_tanh(x * 0.5) * 0.5 + 0.5


@cache
def _fused(fn: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """`fn` as one pass over memory where the machine can compile, else as it is."""
    compiled = mx.compile(fn, shapeless=True)
    try:
        mx.eval(compiled(mx.zeros((2,))))
    except RuntimeError:  # MLX does without a compiler, but not with one that fails or has nowhere to write
        return fn
    return compiled


@_custom_function
def _tanh(x: mx.array) -> mx.array:
    return _fused(_rational_tanh)(x)


@_tanh.vjp
def _tanh_vjp(_x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent * (1 - y * y)


@_custom_function
def _sigmoid(x: mx.array) -> mx.array:
    return _fused(_rational_sigmoid)(x)


@_sigmoid.vjp
def _sigmoid_vjp(_x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent * (y * (1 - y))


def softmax(x: mx.array, axis: int = -1) -> mx.array:
    """Softmax, summed in float32 whatever the dtype."""
    return mx.softmax(x, axis=axis, precise=True)


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None) -> mx.array:
    """Scaled dot-product attention.

    Args:
        q: (B, heads, N, d); k, v: (B, heads, M, d).
        scale: factor on the scores, usually d ** -0.5.
        mask: additive, broadcastable to (B, heads, N, M); None for none.

    Returns:
        (B, heads, N, d).
    """
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
