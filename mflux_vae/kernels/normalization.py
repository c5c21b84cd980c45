"""Group, batch, layer and root-mean-square normalization."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx
import numpy as np

from mflux_vae.kernels.activations import silu
from mflux_vae.kernels.cpu.fusion import fused
from mflux_vae.kernels.cpu.parallel import can_fuse, fill_parallel, is_eager, map_chunks, split_pixels
from mflux_vae.kernels.gpu_fusion import widened
from mflux_vae.kernels.overrides import overridable, pointwise
from mflux_vae.runtime import device

_MAX_PIXELS_PER_SUM = 4096


@overridable
def group_norm(x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Group normalization over (H, W) and the channels of a group, as torch orders them (Wu and He 2018).

    Args:
        x: (B, ..., C), normalized over every axis between batch and channels.
        groups: number of groups, a divisor of C.
        weight, bias: (C,).
    """
    if not device.is_cpu():
        return _group_norm_gpu(groups, eps)(x, weight, bias)
    return group_norm_apply(x, *group_norm_statistics(x, groups), weight, bias, eps)


def group_norm_statistics(x: mx.array, groups: int) -> tuple[mx.array, mx.array]:
    """Mean and variance per sample and group, repeated for its channels: both (B, C), float32.

    Reduces over pixels first, then over the channels of a group.
    """
    batch, channels, width = x.shape[0], x.shape[-1], x.shape[-2]
    if is_eager(x):
        return _chunked_statistics(x.reshape(batch, -1, channels), groups)
    x = x.reshape(batch, -1, channels)
    mean = group_mean(_pixel_mean(x.astype(mx.float32), width), groups)
    return mean, group_mean(_pixel_mean(_square_from(mean[:, None], x), width), groups)


def group_norm_apply(
    x: mx.array, mean: mx.array, variance: mx.array, weight: mx.array, bias: mx.array, eps: float
) -> mx.array:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32. x: (B, ..., C); mean, variance: (B, C)."""
    spread = (-1, *(1,) * (x.ndim - 2), x.shape[-1])
    if not device.is_cpu():
        return _affine_gpu(x, *_affine(mean, variance, weight, bias, eps, spread))
    scale = (mx.rsqrt(variance + eps) * weight).reshape(spread)
    return ((x.astype(mx.float32) - mean.reshape(spread)) * scale + bias).astype(x.dtype)


def group_norm_silu(x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """silu(group_norm(x, ...)), not in chunks; on Metal and CUDA in one pass after the statistics."""
    if device.is_cpu():
        return silu(group_norm(x, groups, weight, bias, eps))
    return _group_norm_gpu(groups, eps, silu=True)(x, weight, bias)


@cache
def _group_norm_gpu(groups: int, eps: float, *, silu: bool = False) -> Callable[..., mx.array]:
    """`group_norm` or `group_norm_silu` as one formula, whose backward pass keeps x alone."""

    def formula(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        spread = (-1, *(1,) * (x.ndim - 2), x.shape[-1])
        mean, scale, shift = _affine(*group_norm_statistics(x, groups), weight, bias, eps, spread)
        y = (x - mean) * scale + shift
        return y * mx.sigmoid(y) if silu else y

    return widened(formula)


def _affine(
    mean: mx.array, variance: mx.array, weight: mx.array, bias: mx.array, eps: float, shape: tuple[int, ...]
) -> tuple[mx.array, mx.array, mx.array]:
    """Mean, scale and shift for `_affine_gpu`, float32, in a shape that is broadcast to x."""
    scale = mx.rsqrt(variance + eps) * weight.astype(mx.float32)
    shift = mx.broadcast_to(bias.astype(mx.float32), scale.shape)
    return mean.reshape(shape), scale.reshape(shape), shift.reshape(shape)


@widened
def _affine_gpu(x: mx.array, mean: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return (x - mean) * scale + shift


def _square_from(mean: mx.array, x: mx.array) -> mx.array:
    """(x - mean)^2 in float32."""
    return mx.square(x.astype(mx.float32) - mean) if device.is_cpu() else _square_from_gpu(mean, x)


@widened
def _square_from_gpu(mean: mx.array, x: mx.array) -> mx.array:
    return mx.square(x - mean)


def group_norm_affine(
    x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """Scale and shift of group normalization per sample and channel, (B, C) each, float32."""
    mean, variance = group_norm_statistics(x, groups)
    scale = mx.rsqrt(variance + eps) * weight
    return scale, bias - mean * scale


def _chunked_statistics(x: mx.array, groups: int) -> tuple[mx.array, mx.array]:
    """`group_norm_statistics` of x (B, N, C), merged from channel statistics per chunk (Chan et al. 1979)."""
    batch, pixels, channels = x.shape
    images, parts = split_pixels(batch, pixels, channels)
    parts = [
        slice(part.start + i, min(part.start + i + _MAX_PIXELS_PER_SUM, part.stop))
        for part in parts
        for i in range(0, part.stop - part.start, _MAX_PIXELS_PER_SUM)
    ]

    def chunk(samples: slice, part: slice) -> mx.array:
        """Mean and variance per channel, (b, 2, C). Sums are matrix products, which are vectorized."""
        block = x[samples, part].astype(mx.float32)
        ones, share = mx.ones((1, 1, block.shape[1])), 1 / block.shape[1]
        mean = ones @ block * share
        return mx.concatenate([mean, ones @ _squared_distance(block, mean) * share], axis=1)

    chunks = (((samples, i), partial(chunk, samples, part)) for samples in images for i, part in enumerate(parts))
    y = fill_parallel(mx.zeros((batch, len(parts), 2, channels)), chunks)
    means, variances = mx.unflatten(y.swapaxes(1, 2), -1, (groups, -1)).swapaxes(0, 1)
    share = mx.array([(part.stop - part.start) / pixels for part in parts]).reshape(-1, 1, 1)
    share = share / (channels // groups)
    mean = (means * share).sum(axis=(1, 3), keepdims=True)
    variance = ((variances + mx.square(means - mean)) * share).sum(axis=(1, 3), keepdims=True)
    shape = (batch, groups, channels // groups)
    return tuple(mx.broadcast_to(v[:, 0], shape).reshape(batch, channels) for v in (mean, variance))  # type: ignore[return-value]


@fused
def scale_and_shift(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """x * scale + shift."""
    return x * scale + shift


@fused
def _squared_distance(x: mx.array, y: mx.array) -> mx.array:
    difference = x - y
    return difference * difference


def _pixel_mean(x: mx.array, width: int) -> mx.array:
    """Mean over axis 1. Many pixels are averaged row by row, since MLX's sequential sum accumulates rounding."""
    batch, pixels, channels = x.shape
    if pixels > _MAX_PIXELS_PER_SUM:
        x = mx.mean(x.reshape(batch, -1, width, channels), axis=2)
    return mx.mean(x, axis=1)


def group_mean(values: mx.array, groups: int) -> mx.array:
    """Mean over the channels of each group, repeated for them. (B, C) -> (B, C)."""
    batch, channels = values.shape
    mean = mx.mean(values.reshape(batch, groups, -1), axis=-1, keepdims=True)
    return mx.broadcast_to(mean, (batch, groups, channels // groups)).reshape(batch, channels)


def batch_statistics(x: mx.array) -> tuple[mx.array, mx.array]:
    """Mean and (biased) variance per channel, in two passes. (N, C) -> (C,) each, float32.

    On a CPU, sums are matrix products with ones, which are vectorized and use all cores. On a GPU such products are
    slow, and with TF32 they would round every number to 10 bits.
    """
    if not device.is_cpu():
        mean = mx.mean(x.astype(mx.float32), axis=0)
        return mean, mx.mean(_square_from_gpu(mean, x), axis=0)
    x = x.astype(mx.float32)
    ones = mx.full((1, x.shape[0]), 1 / x.shape[0])
    mean = (ones @ x)[0]
    return mean, (ones @ mx.square(x - mean))[0]


@overridable
def batch_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> tuple[mx.array, mx.array, mx.array]:
    """Batch normalization with batch statistics (Ioffe and Szegedy 2015).

    Args:
        x: (..., C); weight, bias: (C,).

    Returns:
        the normalized x, and mean and (biased) variance, (C,) each, float32.
    """
    if x.dtype != mx.float32 or not is_eager(x, weight, bias):
        mean, variance = batch_statistics(x.reshape(-1, x.shape[-1]))
        return batch_norm_apply(x, mean, variance, weight, bias, eps), mean, variance
    flat = x.reshape(1, -1, x.shape[-1])
    mean, variance = (values[0] for values in group_norm_statistics(flat, x.shape[-1]))
    scale = mx.rsqrt(variance + eps) * weight
    shift = bias - mean * scale
    y = map_chunks(lambda samples, part: scale_and_shift(flat[samples, part], scale, shift), flat.shape)
    return y.reshape(x.shape), mean, variance


def batch_norm_apply(
    x: mx.array, mean: mx.array, variance: mx.array, weight: mx.array, bias: mx.array, eps: float
) -> mx.array:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32. x: (..., C); the others: (C,)."""
    scale = mx.rsqrt(variance + eps) * weight
    if not device.is_cpu():
        return _affine_gpu(x, mean, scale, bias)
    return (x.astype(mx.float32) * scale + (bias - mean * scale)).astype(x.dtype)


@pointwise
def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """Root-mean-square normalization over the last axis (Zhang and Sennrich 2019)."""
    if not device.is_cpu():
        return mx.fast.rms_norm(x, weight, eps)
    x32 = x.astype(mx.float32)
    y = (x32 * mx.rsqrt(_mean(mx.square(x32)) + eps)).astype(x.dtype)
    return y if weight is None else y * weight


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """Layer normalization over the last axis; weight and bias may be None."""
    if not can_fuse(x):
        return mx.fast.layer_norm(x, weight, bias, eps)
    x32 = x.astype(mx.float32)
    x32 = x32 - _mean(x32)
    y = x32 * mx.rsqrt(_mean(mx.square(x32)) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).astype(x.dtype)


def _mean(x: mx.array) -> mx.array:
    """Mean over the last axis, which is kept. A matrix product, because it is vectorized."""
    return x @ _mean_weights(x.shape[-1])


@cache
def _mean_weights(count: int) -> mx.array:
    return mx.array(np.full((count, 1), 1 / count, np.float32))
