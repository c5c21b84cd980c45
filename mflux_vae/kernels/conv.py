"""Two-dimensional convolution, NHWC: the native extension on a CPU, `gpu_conv` on Metal and CUDA, else MLX's."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae.kernels import gpu_conv
from mflux_vae.kernels.activations import silu
from mflux_vae.kernels.cpu.extension import native
from mflux_vae.kernels.normalization import group_norm, group_norm_silu
from mflux_vae.kernels.overrides import overridable
from mflux_vae.kernels.padding import Padding, Sides, normalize_padding, zero_pad
from mflux_vae.runtime import device


@overridable
def conv2d(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    stride: int = 1,
    padding: Padding = 0,
) -> mx.array:
    """2-D convolution (cross-correlation).

    Args:
        x: (B, H, W, C).
        weight: (O, kh, kw, C).
        bias: (O,) or None.
        stride: in both directions.
        padding: zeros around the image, as one number or ((top, bottom), (left, right)).

    Returns:
        (B, (H + top + bottom - kh) // stride + 1, (W + left + right - kw) // stride + 1, O).

    Raises:
        ValueError: the kernel is larger than the padded image, or the channels differ.
    """
    (top, bottom), (left, right) = sides = normalize_padding(padding)
    height, width = x.shape[1] + top + bottom, x.shape[2] + left + right
    if height < weight.shape[1] or width < weight.shape[2] or x.shape[3] != weight.shape[3]:
        raise ValueError(
            f"conv2d: input {x.shape} (B, H, W, C), {height} x {width} with padding, "
            f"does not fit kernel {weight.shape} (O, kh, kw, C)"
        )
    if (cpu := native()) is not None:
        y = cpu.conv2d(x, weight, bias, stride=stride, padding=(top, bottom, left, right)).astype(x.dtype)
        return y
    if device.is_cpu():  # half-precision products are thirty times slower
        wide, kernel = x.astype(mx.float32), weight.astype(mx.float32)
        if stride > 1:
            wide, kernel, sides = *_as_blocks(wide, kernel, stride, sides), normalize_padding(0)
        y = gpu_conv.mlx_conv2d(wide, kernel, 1, sides).astype(x.dtype)
    else:
        y = gpu_conv.conv2d(x, weight, stride, sides)
    return y if bias is None else (y + bias).astype(y.dtype)


def _as_blocks(x: mx.array, weight: mx.array, stride: int, sides: Sides) -> tuple[mx.array, mx.array]:
    """Image and kernel with the pixels of `stride` x `stride` blocks as channels, for a convolution with stride 1.

    MLX's input gradient of a convolution with stride 2 takes 50 times as long as the convolution.
    """

    def blocks(array: mx.array, before: tuple[int, int], size: tuple[int, ...]) -> mx.array:
        count, height, width, channels = array.shape
        (top, left), (rows, columns) = before, (stride * n for n in size)
        array = array[:, : rows - top, : columns - left]
        array = zero_pad(array, ((top, max(rows - top - height, 0)), (left, max(columns - left - width, 0))))
        array = array.reshape(count, size[0], stride, size[1], stride, channels).transpose(0, 1, 3, 2, 4, 5)
        return array.reshape(count, *size, -1)

    (top, bottom), (left, right) = sides
    kernel = tuple(-(-n // stride) for n in weight.shape[1:3])
    padded = x.shape[1] + top + bottom, x.shape[2] + left + right
    size = tuple((n - k) // stride + c for n, k, c in zip(padded, weight.shape[1:3], kernel, strict=True))
    return blocks(x, (top, left), size), blocks(weight, (0, 0), kernel)


@overridable
def norm_silu_conv2d(
    x: mx.array,
    norm: tuple[int, mx.array, mx.array, float],
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    padding: Padding = 0,
    residual: mx.array | None = None,
) -> mx.array:
    """residual + conv2d(silu(group_norm(x, *norm)), weight, bias), with the norm applied as the convolution reads x.

    Args:
        norm: groups, weight, bias and eps of `group_norm`.
        residual: same shape as the result, or None.
    """
    if (cpu := native()) is not None and isinstance(x, mx.array):
        x, same = cpu.fork(x)
        scale, shift = cpu.group_norm_affine(same, *norm)
        (top, bottom), (left, right) = normalize_padding(padding)
        options = {"scale": scale, "shift": shift, "silu": True, "padding": (top, bottom, left, right)}
        y: mx.array = cpu.conv2d(x, weight, bias, residual, **options).astype(weight.dtype)
        return y
    y = group_norm_silu(x, *norm) if isinstance(x, mx.array) else silu(group_norm(x, *norm))
    y = conv2d(y.astype(weight.dtype) if device.is_cpu() else y, weight, bias, padding=padding)
    return y if residual is None else residual + y


@overridable
def partial_conv2d(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, *, start: int = 0, padding: Padding = 0
) -> mx.array:
    """conv2d with those input channels of the weight that x has, from `start` on."""
    return conv2d(x, weight[..., start : start + x.shape[-1]], bias, padding=padding)


@overridable
def repeat_conv2d(x: mx.array, weight: mx.array, bias: mx.array | None = None, *, padding: Padding = 0) -> mx.array:
    """conv2d(upsample_nearest_2x(x), weight, bias), on a CPU without storing the upsampled image."""
    if (cpu := native()) is not None and isinstance(x, mx.array):
        (top, bottom), (left, right) = normalize_padding(padding)
        y: mx.array = cpu.conv2d(x, weight, bias, doubled=True, padding=(top, bottom, left, right)).astype(x.dtype)
        return y
    return conv2d(upsample_nearest_2x(x), weight, bias, padding=padding)


@overridable
def upsample_nearest_2x(x: mx.array) -> mx.array:
    """Nearest-neighbour upsampling by two. (B, H, W, C) -> (B, 2H, 2W, C)."""
    batch, height, width, channels = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


FUSED = (norm_silu_conv2d, partial_conv2d, repeat_conv2d)
"""Functions whose `__wrapped__` runs step by step, for arguments that override operations."""
