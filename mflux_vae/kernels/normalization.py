"""Group, batch, layer and root-mean-square normalization."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import mlx.core as mx

from mflux_vae.kernels.activations import leaky_relu
from mflux_vae.kernels.cpu.extension import native
from mflux_vae.kernels.gpu_fusion import widened
from mflux_vae.kernels.overrides import overridable, pointwise

_MAX_PIXELS_PER_SUM = 4096


@overridable
def group_norm(x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Group normalization over (H, W) and the channels of a group, as torch orders them (Wu and He 2018).

    Args:
        x: (B, ..., C), normalized over every axis between batch and channels.
        groups: number of groups, a divisor of C.
        weight, bias: (C,).
    """
    if (cpu := native()) is None:
        return _group_norm(groups, eps)(x, weight, bias)
    y: mx.array = cpu.group_norm(x, groups, weight, bias, eps).astype(x.dtype)
    return y


def group_norm_silu(x: mx.array, groups: int, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """silu(group_norm(x, ...)), in one pass after the statistics."""
    if (cpu := native()) is None:
        return _group_norm(groups, eps, silu=True)(x, weight, bias)
    y: mx.array = cpu.group_norm(x, groups, weight, bias, eps, cpu.Activation.silu).astype(x.dtype)
    return y


@cache
def _group_norm(groups: int, eps: float, *, silu: bool = False) -> Callable[..., mx.array]:
    """`group_norm` or `group_norm_silu` as one formula, whose backward pass on a GPU keeps x alone."""

    def formula(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        spread = (-1, *(1,) * (x.ndim - 2), x.shape[-1])
        mean, scale, shift = _affine(*group_norm_statistics(x, groups), weight, bias, eps, spread)
        y = (x - mean) * scale + shift
        return y * mx.sigmoid(y) if silu else y

    return widened(formula)


def group_norm_statistics(x: mx.array, groups: int) -> tuple[mx.array, mx.array]:
    """Mean and variance per sample and group, repeated for its channels: both (B, C), float32.

    Reduces over pixels first, then over the channels of a group.
    """
    batch, channels, width = x.shape[0], x.shape[-1], x.shape[-2]
    x = x.reshape(batch, -1, channels)
    mean = group_mean(_pixel_mean(x.astype(mx.float32), width), groups)
    return mean, group_mean(_pixel_mean(_square_from(mean[:, None], x), width), groups)


def group_norm_apply(
    x: mx.array, mean: mx.array, variance: mx.array, weight: mx.array, bias: mx.array, eps: float
) -> mx.array:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32. x: (B, ..., C); mean, variance: (B, C)."""
    spread = (-1, *(1,) * (x.ndim - 2), x.shape[-1])
    return _centred_affine(x, *_affine(mean, variance, weight, bias, eps, spread))


def _affine(
    mean: mx.array, variance: mx.array, weight: mx.array, bias: mx.array, eps: float, shape: tuple[int, ...]
) -> tuple[mx.array, mx.array, mx.array]:
    """Mean, scale and shift for `_centred_affine`, float32, in a shape that is broadcast to x."""
    scale = mx.rsqrt(variance + eps) * weight.astype(mx.float32)
    shift = mx.broadcast_to(bias.astype(mx.float32), scale.shape)
    return mean.reshape(shape), scale.reshape(shape), shift.reshape(shape)


@widened
def _centred_affine(x: mx.array, mean: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return (x - mean) * scale + shift


@widened
def _square_from(mean: mx.array, x: mx.array) -> mx.array:
    return mx.square(x - mean)


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
    """Mean and (biased) variance per channel, in two passes. (N, C) -> (C,) each, float32."""
    mean = mx.mean(x.astype(mx.float32), axis=0)
    return mean, mx.mean(_square_from(mean, x), axis=0)


@overridable
def batch_norm(
    x: mx.array, weight: mx.array, bias: mx.array, eps: float, slope: float = 1.0
) -> tuple[mx.array, mx.array, mx.array]:
    """Batch normalization with batch statistics (Ioffe and Szegedy 2015), then leaky ReLU.

    Args:
        x: (..., C); weight, bias: (C,).
        slope: of the leaky ReLU; 1 for none.

    Returns:
        the result, and mean and (biased) variance, (C,) each, float32, without gradients.
    """
    if (cpu := native()) is not None:
        activation = cpu.Activation.none if slope == 1 else cpu.Activation.leaky_relu
        y, mean, variance = cpu.batch_norm(x, weight, bias, eps, activation, slope)
        return y.astype(x.dtype), mean, variance
    mean, variance = batch_statistics(x.reshape(-1, x.shape[-1]))
    y = batch_norm_apply(x, mean, variance, weight, bias, eps)
    return y if slope == 1 else leaky_relu(y, slope), mx.stop_gradient(mean), mx.stop_gradient(variance)


def batch_norm_apply(
    x: mx.array, mean: mx.array, variance: mx.array, weight: mx.array, bias: mx.array, eps: float
) -> mx.array:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32. x: (..., C); the others: (C,)."""
    return _centred_affine(x, mean, mx.rsqrt(variance + eps) * weight, bias)


@pointwise
def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """Root-mean-square normalization over the last axis (Zhang and Sennrich 2019).

    Args:
        x: (B, ..., D).
        weight: (D,), (B, 1, D) or None.
    """
    if (cpu := native()) is None:
        if weight is None or weight.ndim == 1:
            return mx.fast.rms_norm(x, weight, eps)
        return mx.fast.rms_norm(x, None, eps) * weight
    y: mx.array = cpu.norm(x, weight, None, eps, rms=True).astype(x.dtype)
    return y


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    """Layer normalization over the last axis; weight and bias may be None."""
    if (cpu := native()) is None:
        return mx.fast.layer_norm(x, weight, bias, eps)
    y: mx.array = cpu.norm(x, weight, bias, eps, rms=False).astype(x.dtype)
    return y


def modulated_norm(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """Layer normalization, then * (1 + scale) + shift, both (B, 1, D)."""
    if (cpu := native()) is None:
        return _modulated_norm(eps)(x, shift, scale)
    y: mx.array = cpu.norm(x, scale, shift, eps, rms=False, offset=1.0).astype(x.dtype)
    return y


@cache
def _modulated_norm(eps: float) -> Callable[..., mx.array]:
    def formula(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, None, None, eps) * (1 + scale) + shift

    return widened(formula)
