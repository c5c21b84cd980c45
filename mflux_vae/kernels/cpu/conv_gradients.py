"""Gradients in closed form, for the CPU, where they are computed at once and in bands like the functions themselves.

What MLX differentiates it traces, and inside a trace nothing is fused, banded or computed on more than one core. A
caller that goes back through a network by itself (`mflux_vae_train.training.tape`) takes these instead. Each answers
for the cotangent `dy` of a function's result. Arrays are float32, images NHWC.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mflux_vae.kernels.activations import sigmoid
from mflux_vae.kernels.cpu import conv_parallel
from mflux_vae.kernels.cpu.conv_algorithms import Padding, form_of, padded, sides_of, weight_to_depth
from mflux_vae.kernels.cpu.fusion import fused
from mflux_vae.kernels.cpu.parallel import filled, mapped, pieces
from mflux_vae.kernels.normalization import group_norm_statistics, over_group, scale_and_shift

_OVERLAPPED_MIN_CHANNELS = 32
"""Of a gradient that is multiplied into overlapping windows: with fewer, adding those up takes too long."""


def sum_of_rows(y: mx.array) -> mx.array:
    """Sum over all axes but the last, (..., C) -> (C,): a product with ones, which uses every lane of a vector."""
    flat = y.reshape(-1, y.shape[-1])
    return (mx.ones((1, flat.shape[0])) @ flat)[0]


def conv2d_input(
    dy: mx.array, weight: mx.array, shape: tuple[int, ...], *, stride: int = 1, padding: Padding = 0
) -> mx.array:
    """Gradient of `conv2d` for its input: a convolution with the turned weights, or windows laid over each other.

    Args:
        dy: (B, h, w, O).
        weight: (O, kh, kw, C).
        shape: of the input, (B, H, W, C).
        stride: 1 or 2.
        padding: as of `conv2d`, each less than the kernel.
    """
    (top, _), (left, _) = sides_of(padding)
    batch, height, width, channels = shape
    if weight.shape[1:3] == (1, 1) and stride == 1 and dy.shape[1:3] == shape[1:3]:
        return dy @ weight.reshape(-1, channels)
    out, kh, kw, _ = weight.shape
    form = form_of((kh, kw), stride, out, channels, batch * height * width)
    if form == "patches" and out >= _OVERLAPPED_MIN_CHANNELS:
        return conv_parallel.input_gradient(dy, weight, shape, stride, sides_of(padding))
    if stride == 1:
        before_h, before_w = kh - 1 - top, kw - 1 - left
        after_h, after_w = height + kh - 1 - dy.shape[1] - before_h, width + kw - 1 - dy.shape[2] - before_w
        sides = (before_h, after_h), (before_w, after_w)
        return conv_parallel.convolution(conv_parallel.rows_of(dy), dy.shape, weight, None, 1, sides, turned=True)
    blocks = weight_to_depth(weight)
    kh, kw = blocks.shape[1:3]
    sides = (kh - 1, kh - 1), (kw - 1, kw - 1)
    dx = conv_parallel.convolution(conv_parallel.rows_of(dy), dy.shape, blocks, None, 1, sides, turned=True)
    down, across = dx.shape[1:3]
    dx = dx.reshape(batch, down, across, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    dx = dx.reshape(batch, 2 * down, 2 * across, channels)[:, top : top + height, left : left + width]
    missing = [(0, size - there) for size, there in zip(shape[1:3], dx.shape[1:3], strict=True)]
    return padded(dx, (missing[0], missing[1]))


def conv2d_weight(
    x: mx.array, dy: mx.array, kernel: tuple[int, int], *, stride: int = 1, padding: Padding = 0
) -> mx.array:
    """Gradient of `conv2d` for its weight, (O, kh, kw, C).

    Args:
        x: (B, H, W, C).
        dy: (B, h, w, O).
    """
    return conv_parallel.weight_gradient(conv_parallel.rows_of(x), x.shape, dy, kernel, stride, sides_of(padding))


def repeat_conv2d(x: mx.array, weight: mx.array, dy: mx.array, *, padding: Padding = 0) -> tuple[mx.array, mx.array]:
    """Of `repeat_conv2d` for input and weight."""
    batch, height, width, channels = x.shape
    shape = (batch, 2 * height, 2 * width, channels)
    dx = conv2d_input(dy, weight, shape, padding=padding).reshape(batch, height, 2, width, 2, channels)
    dx = _sum_of_four(dx[:, :, 0, :, 0], dx[:, :, 0, :, 1], dx[:, :, 1, :, 0], dx[:, :, 1, :, 1])
    rows, kernel = conv_parallel.repeated_rows_of(x), (weight.shape[1], weight.shape[2])
    return dx, conv_parallel.weight_gradient(rows, shape, dy, kernel, 1, sides_of(padding))


class NormSiluConv(NamedTuple):
    """Gradients of `norm_silu_conv2d`."""

    x: mx.array
    norm_weight: mx.array
    norm_bias: mx.array
    weight: mx.array


def norm_silu_conv2d(
    x: mx.array,
    norm: tuple[int, mx.array, mx.array, float],
    weight: mx.array,
    dy: mx.array,
    *,
    padding: Padding = 0,
) -> NormSiluConv:
    """Of `norm_silu_conv2d`; what its norm and SiLU make is computed again, band by band."""
    groups, gain, bias, eps = norm
    mean, variance = group_norm_statistics(x, groups)
    r = mx.rsqrt(variance + eps)
    scale = r * gain
    shift = bias - mean * scale
    rows, kernel = conv_parallel.silu_rows_of(x, scale, shift), (weight.shape[1], weight.shape[2])
    d_weight = conv_parallel.weight_gradient(rows, x.shape, dy, kernel, 1, sides_of(padding))
    da = conv2d_input(dy, weight, x.shape, padding=padding)
    dh = _through_silu(x, scale, shift, da)
    return NormSiluConv(*_norm(x, groups, gain, mean, r, dh), d_weight)


def _through_silu(x: mx.array, scale: mx.array, shift: mx.array, da: mx.array) -> mx.array:
    """Gradient of silu(x scale + shift) for what SiLU takes; scale and shift (B, C)."""
    shape = x.shape
    x, da = x.reshape(shape[0], -1, shape[-1]), da.reshape(shape[0], -1, shape[-1])

    def band(these: slice, part: slice) -> mx.array:
        h = scale_and_shift(x[these, part], scale[these, None], shift[these, None])
        return _silu_slope_times(h, sigmoid(h), da[these, part])

    return mapped(band, x.shape).reshape(shape)


def batch_norm(
    x: mx.array, gain: mx.array, mean: mx.array, variance: mx.array, eps: float, dy: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Of `batch_norm` for x, gain and bias; mean and variance are those of the batch, (C,)."""
    flat, r = x.reshape(1, -1, x.shape[-1]), mx.rsqrt(variance + eps)
    dx, d_gain, d_bias = _norm(flat, x.shape[-1], gain, mean[None], r[None], dy.reshape(flat.shape))
    return dx.reshape(x.shape), d_gain, d_bias


def _norm(
    x: mx.array, groups: int, gain: mx.array, mean: mx.array, r: mx.array, dh: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of h = (x - mean) r gain + bias for x, gain and bias; mean and r = 1 / deviation, (B, C), are x's own.

    With g = gain dh and means over a group: dx = r (g - mean(g) - (x - mean) r^2 mean(g (x - mean))).
    """
    shape, batch, channels = x.shape, x.shape[0], x.shape[-1]
    x, dh = x.reshape(batch, -1, channels), dh.reshape(batch, -1, channels)

    # each image's sums of dh over pixels, plain and times x - mean
    images, parts = pieces(batch, x.shape[1], channels)

    def summed(these: slice, part: slice) -> mx.array:
        ones = mx.ones((1, 1, part.stop - part.start))
        moment = _times_difference(dh[these, part], x[these, part], mean[these, None])
        return mx.concatenate([ones @ dh[these, part], ones @ moment], axis=1)

    bands = (((these, i), partial(summed, these, part)) for these in images for i, part in enumerate(parts))
    total, moment = filled(mx.zeros((batch, len(parts), 2, channels)), bands).sum(axis=1).swapaxes(0, 1)

    # three factors for each image and channel: of dh, of x, and none
    share = 1 / x.shape[1]
    first = over_group(total * gain, groups) * (r * share)
    second = over_group(moment * gain, groups) * (r * r * r * share)
    constant, scale = second * mean - first, r * gain

    def combined(these: slice, part: slice) -> mx.array:
        of_each = (values[these, None] for values in (scale, second, constant))
        return _affine(dh[these, part], x[these, part], *of_each)

    return mapped(combined, x.shape).reshape(shape), (moment * r).sum(axis=0), total.sum(axis=0)


def leaky_relu(y: mx.array, slope: float, dy: mx.array) -> mx.array:
    """Of max(x, slope x), from its result y."""
    flat, dy = y.reshape(1, -1, y.shape[-1]), dy.reshape(1, -1, y.shape[-1])
    factor = mx.array(slope)

    def band(these: slice, part: slice) -> mx.array:
        return _leaky_slope_times(flat[these, part], dy[these, part], factor)

    return mapped(band, flat.shape).reshape(y.shape)


@fused
def _sum_of_four(a: mx.array, b: mx.array, c: mx.array, d: mx.array) -> mx.array:
    return (a + b) + (c + d)


@fused
def _silu_slope_times(h: mx.array, s: mx.array, da: mx.array) -> mx.array:
    return da * (s + h * (s - s * s))


@fused
def _times_difference(dh: mx.array, x: mx.array, mean: mx.array) -> mx.array:
    return dh * (x - mean)


@fused
def _leaky_slope_times(y: mx.array, dy: mx.array, slope: mx.array) -> mx.array:
    return mx.where(y > 0, dy, dy * slope)


@fused
def _affine(dh: mx.array, x: mx.array, scale: mx.array, factor: mx.array, constant: mx.array) -> mx.array:
    return dh * scale + (constant - factor * x)
