"""CPU convolution algorithms and the choice between them (described in `mflux_vae.kernels.conv`)."""

from __future__ import annotations

from typing import Literal, TypeAlias

import mlx.core as mx

from mflux_vae.kernels.cpu import winograd
from mflux_vae.kernels.cpu.im2col import im2col

Padding: TypeAlias = int | tuple[tuple[int, int], tuple[int, int]]
Sides: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""Zero padding, ((top, bottom), (left, right))."""

_WINOGRAD_MIN_CHANNELS = 32
IM2COL_MAX_PIXELS = 512
"""Output pixels of all images up to which transforming the weights for Winograd costs more than it saves."""
_SHIFTED_GEMM_MIN_CHANNELS = 8
_SHIFTED_GEMM_MIN_WIDTH = 12
"""In shorter rows, too many products fall on windows that wrap around the end of a row."""
_GEMM_THEN_SHIFT_RATIO = 4
"""Smallest ratio of input to output channels for gemm_then_shift."""


Algorithm: TypeAlias = Literal["winograd", "gemm_then_shift", "shifted_gemm", "native", "im2col"]


def choose_algorithm(kernel: tuple[int, int], stride: int, channels: int, out: int, pixels: int) -> Algorithm:
    """Choose the fastest algorithm for a shape, as measured with MKL on two cores of an AVX-512 server.

    Args:
        kernel: height and width.
        channels, out: input and output channels.
        pixels: output pixels of all images.
    """
    if stride == 1 and out * _GEMM_THEN_SHIFT_RATIO <= channels and out <= 32:
        return "gemm_then_shift"
    if stride == 1 and min(channels, out) >= _WINOGRAD_MIN_CHANNELS:
        return "winograd" if kernel == (3, 3) and pixels > IM2COL_MAX_PIXELS else "im2col"
    if stride == 1 and channels < _WINOGRAD_MIN_CHANNELS:
        return "shifted_gemm" if channels >= _SHIFTED_GEMM_MIN_CHANNELS else "native"
    return "im2col"


def convolve(x: mx.array, weight: mx.array, stride: int = 1, sides: Sides = ((0, 0), (0, 0))) -> mx.array:
    """Convolve (B, H, W, C) with (O, kh, kw, C) in one step, without custom gradients."""
    batch, height, width, channels = x.shape
    out, kh, kw, _ = weight.shape
    (top, bottom), (left, right) = sides
    out_h, out_w = (height + top + bottom - kh) // stride + 1, (width + left + right - kw) // stride + 1
    if kh == kw == stride == 1:
        return zero_pad(x, sides) @ weight.reshape(out, channels).T
    algorithm = choose_algorithm((kh, kw), stride, channels, out, batch * out_h * out_w)
    if algorithm == "winograd":
        count = winograd.tile_count(out_h), winograd.tile_count(out_w)
        y = winograd.convolve(winograd.transform_input(x, count, (top, left)), winograd.transform_weight(weight), count)
        return winograd.join_tiles(y)[:, :out_h, :out_w]
    if algorithm == "gemm_then_shift":
        # (B, H, W, taps * O); the results of a tap are read at its offset
        products = zero_pad(x @ weight.transpose(3, 1, 2, 0).reshape(channels, -1), sides)
        taps = [
            products[:, i : i + out_h, j : j + out_w, (i * kw + j) * out : (i * kw + j + 1) * out]
            for i in range(kh)
            for j in range(kw)
        ]
        return sum(taps[1:], taps[0])
    if algorithm == "shifted_gemm" and out_w >= _SHIFTED_GEMM_MIN_WIDTH:
        x = zero_pad(x, sides)
        _, height, width, _ = x.shape
        flat = x.reshape(-1, channels)
        rows = flat.shape[0] - (kh - 1) * width - (kw - 1)
        y = flat[:rows] @ weight[:, 0, 0].T
        for tap in range(1, kh * kw):
            i, j = divmod(tap, kw)
            start = i * width + j
            y = mx.addmm(y, flat[start : start + rows], weight[:, i, j].T)
        # windows that wrap around the end of a row are never read
        return mx.as_strided(y, (batch, out_h, out_w, out), (height * width * out, width * out, out, 1))
    if algorithm == "native":
        return mx.conv2d(zero_pad(x, sides), weight, stride=stride)
    patches = im2col(x, (kh, kw), stride, (out_h, out_w), (top, left))
    return (patches @ weight.reshape(out, -1).T).reshape(batch, out_h, out_w, out)


def normalize_padding(padding: Padding) -> Sides:
    """Expand a single number to all four sides."""
    return ((padding, padding),) * 2 if isinstance(padding, int) else padding


def zero_pad(x: mx.array, sides: Sides) -> mx.array:
    """Pad (B, H, W, C) with zeros."""
    return mx.pad(x, [(0, 0), *sides, (0, 0)]) if any(map(any, sides)) else x


def repeat_2x(x: mx.array) -> mx.array:
    """(B, H, W, C) -> (B, 2H, 2W, C), repeating every pixel four times."""
    batch, height, width, channels = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def flipped(weight: mx.array) -> mx.array:
    """(O, kh, kw, C) -> (C, kh, kw, O), spatially reversed: the kernel of the input gradient."""
    return weight[:, ::-1, ::-1].transpose(3, 1, 2, 0)


def weight_space_to_depth(weight: mx.array) -> mx.array:
    """Stride-2 weight (O, kh, kw, C) -> stride-1 weight over 2x2 blocks, (O, ceil(kh / 2), ceil(kw / 2), 4C)."""
    out, kh, kw, channels = weight.shape
    weight = mx.pad(weight, [(0, 0), (0, kh % 2), (0, kw % 2), (0, 0)])
    kh, kw = (kh + 1) // 2, (kw + 1) // 2
    weight = weight.reshape(out, kh, 2, kw, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return weight.reshape(out, kh, kw, 4 * channels)
