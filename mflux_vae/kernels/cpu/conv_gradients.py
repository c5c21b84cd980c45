"""Closed-form gradients for the CPU, computed eagerly and in parallel chunks.

`mx.grad` traces a function, and inside a trace MLX's CPU back end neither fuses operations nor uses more than one core.
Callers that run the backward pass themselves (`mflux_vae_train.training.tape`) use these functions instead. `dy` is
the gradient of a function's result. Arrays are float32, images NHWC.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mflux_vae.kernels.activations import sigmoid
from mflux_vae.kernels.cpu import conv_parallel
from mflux_vae.kernels.cpu.conv_algorithms import (
    Padding,
    choose_algorithm,
    normalize_padding,
    weight_space_to_depth,
    zero_pad,
)
from mflux_vae.kernels.cpu.fusion import fused
from mflux_vae.kernels.cpu.parallel import fill_parallel, map_chunks, split_pixels
from mflux_vae.kernels.normalization import group_mean, group_norm_statistics, scale_and_shift

_COL2IM_MIN_CHANNELS = 32
"""Fewest output channels for col2im; with fewer, summing the windows takes longer than a convolution."""


def sum_of_rows(y: mx.array) -> mx.array:
    """Sum over all axes but the last, (..., C) -> (C,). A matrix product with ones, which is vectorized."""
    flat = y.reshape(-1, y.shape[-1])
    return (mx.ones((1, flat.shape[0])) @ flat)[0]


def conv2d_input(
    dy: mx.array, weight: mx.array, shape: tuple[int, ...], *, stride: int = 1, padding: Padding = 0
) -> mx.array:
    """Gradient of `conv2d` for its input: a convolution with the flipped weights, or col2im.

    Args:
        dy: (B, h, w, O).
        weight: (O, kh, kw, C).
        shape: input, (B, H, W, C).
        stride: 1 or 2.
        padding: as in `conv2d`; less than the kernel on each side.
    """
    (top, _), (left, _) = normalize_padding(padding)
    batch, height, width, channels = shape
    if weight.shape[1:3] == (1, 1) and stride == 1 and dy.shape[1:3] == shape[1:3]:
        return dy @ weight.reshape(-1, channels)
    out, kh, kw, _ = weight.shape
    algorithm = choose_algorithm((kh, kw), stride, out, channels, batch * height * width)
    if algorithm == "im2col" and out >= _COL2IM_MIN_CHANNELS:
        return conv_parallel.input_gradient(dy, weight, shape, stride, normalize_padding(padding))
    if stride == 1:
        before_h, before_w = kh - 1 - top, kw - 1 - left
        after_h, after_w = height + kh - 1 - dy.shape[1] - before_h, width + kw - 1 - dy.shape[2] - before_w
        sides = (before_h, after_h), (before_w, after_w)
        return conv_parallel.convolution(conv_parallel.array_rows(dy), dy.shape, weight, None, 1, sides, flip=True)
    blocks = weight_space_to_depth(weight)
    kh, kw = blocks.shape[1:3]
    sides = (kh - 1, kh - 1), (kw - 1, kw - 1)
    dx = conv_parallel.convolution(conv_parallel.array_rows(dy), dy.shape, blocks, None, 1, sides, flip=True)
    down, across = dx.shape[1:3]
    dx = dx.reshape(batch, down, across, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    dx = dx.reshape(batch, 2 * down, 2 * across, channels)[:, top : top + height, left : left + width]
    missing = [(0, size - present) for size, present in zip(shape[1:3], dx.shape[1:3], strict=True)]
    return zero_pad(dx, (missing[0], missing[1]))


def conv2d_weight(
    x: mx.array, dy: mx.array, kernel: tuple[int, int], *, stride: int = 1, padding: Padding = 0
) -> mx.array:
    """Gradient of `conv2d` for its weight, (O, kh, kw, C).

    Args:
        x: (B, H, W, C).
        dy: (B, h, w, O).
    """
    return conv_parallel.weight_gradient(
        conv_parallel.array_rows(x), x.shape, dy, kernel, stride, normalize_padding(padding)
    )


def repeat_conv2d(x: mx.array, weight: mx.array, dy: mx.array, *, padding: Padding = 0) -> tuple[mx.array, mx.array]:
    """Gradients of `repeat_conv2d` for input and weight."""
    batch, height, width, channels = x.shape
    shape = (batch, 2 * height, 2 * width, channels)
    dx = conv2d_input(dy, weight, shape, padding=padding).reshape(batch, height, 2, width, 2, channels)
    dx = _sum_of_four(dx[:, :, 0, :, 0], dx[:, :, 0, :, 1], dx[:, :, 1, :, 0], dx[:, :, 1, :, 1])
    rows, kernel = conv_parallel.upsampled_rows(x), (weight.shape[1], weight.shape[2])
    return dx, conv_parallel.weight_gradient(rows, shape, dy, kernel, 1, normalize_padding(padding))


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
    """Gradients of `norm_silu_conv2d`. Recomputes norm and SiLU chunk by chunk."""
    groups, gain, bias, eps = norm
    mean, variance = group_norm_statistics(x, groups)
    inv_std = mx.rsqrt(variance + eps)
    scale = inv_std * gain
    shift = bias - mean * scale
    rows, kernel = conv_parallel.silu_rows(x, scale, shift), (weight.shape[1], weight.shape[2])
    d_weight = conv_parallel.weight_gradient(rows, x.shape, dy, kernel, 1, normalize_padding(padding))
    da = conv2d_input(dy, weight, x.shape, padding=padding)
    dh = _silu_gradient(x, scale, shift, da)
    return NormSiluConv(*_norm_gradient(x, groups, gain, mean, inv_std, dh), d_weight)


def _silu_gradient(x: mx.array, scale: mx.array, shift: mx.array, da: mx.array) -> mx.array:
    """Gradient of silu(h) for h = x * scale + shift; scale, shift: (B, C)."""
    shape = x.shape
    x, da = x.reshape(shape[0], -1, shape[-1]), da.reshape(shape[0], -1, shape[-1])

    def chunk(samples: slice, part: slice) -> mx.array:
        h = scale_and_shift(x[samples, part], scale[samples, None], shift[samples, None])
        return _silu_slope_times(h, sigmoid(h), da[samples, part])

    return map_chunks(chunk, x.shape).reshape(shape)


def batch_norm(
    x: mx.array, gain: mx.array, mean: mx.array, variance: mx.array, eps: float, dy: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of `batch_norm` for x, gain and bias; mean, variance: batch statistics, (C,)."""
    flat, inv_std = x.reshape(1, -1, x.shape[-1]), mx.rsqrt(variance + eps)
    dx, d_gain, d_bias = _norm_gradient(flat, x.shape[-1], gain, mean[None], inv_std[None], dy.reshape(flat.shape))
    return dx.reshape(x.shape), d_gain, d_bias


def _norm_gradient(
    x: mx.array, groups: int, gain: mx.array, mean: mx.array, inv_std: mx.array, dh: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of h = (x - mean) r gain + bias for x, gain and bias; mean and r (`inv_std`) of x are (B, C).

    With g = gain dh and means over a group: dx = r (g - mean(g) - (x - mean) r^2 mean(g (x - mean))).
    """
    shape, batch, channels = x.shape, x.shape[0], x.shape[-1]
    x, dh = x.reshape(batch, -1, channels), dh.reshape(batch, -1, channels)

    # per image, sums over pixels of dh and of dh * (x - mean)
    images, parts = split_pixels(batch, x.shape[1], channels)

    def summed(samples: slice, part: slice) -> mx.array:
        ones = mx.ones((1, 1, part.stop - part.start))
        moment = _times_difference(dh[samples, part], x[samples, part], mean[samples, None])
        return mx.concatenate([ones @ dh[samples, part], ones @ moment], axis=1)

    chunks = (((samples, i), partial(summed, samples, part)) for samples in images for i, part in enumerate(parts))
    total, moment = fill_parallel(mx.zeros((batch, len(parts), 2, channels)), chunks).sum(axis=1).swapaxes(0, 1)

    # per image and channel, the factors of dh and of x, and the constant
    share = 1 / x.shape[1]
    dh_mean = group_mean(total * gain, groups) * (inv_std * share)
    moment_mean = group_mean(moment * gain, groups) * (inv_std * inv_std * inv_std * share)
    constant, scale = moment_mean * mean - dh_mean, inv_std * gain

    def combined(samples: slice, part: slice) -> mx.array:
        factors = (values[samples, None] for values in (scale, moment_mean, constant))
        return _affine(dh[samples, part], x[samples, part], *factors)

    return map_chunks(combined, x.shape).reshape(shape), (moment * inv_std).sum(axis=0), total.sum(axis=0)


def leaky_relu(y: mx.array, slope: float, dy: mx.array) -> mx.array:
    """Gradient of y = max(x, slope * x), computed from y."""
    flat, dy = y.reshape(1, -1, y.shape[-1]), dy.reshape(1, -1, y.shape[-1])
    factor = mx.array(slope)

    def chunk(samples: slice, part: slice) -> mx.array:
        return _leaky_slope_times(flat[samples, part], dy[samples, part], factor)

    return map_chunks(chunk, flat.shape).reshape(y.shape)


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
