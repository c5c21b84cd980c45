"""Two-dimensional convolution.

On a CPU, `cpu.conv_algorithms` chooses one of six algorithms by shape (`python -m benchmarks.convolutions` times them):

- winograd (3x3, stride 1, enough channels and pixels): a quarter of the multiplications, see `cpu.winograd`;
- gemm_then_shift (few output channels): one matrix product of all pixels with the weights of all taps, whose results
  are then shifted and added;
- shifted_gemm (stride 1, few channels, wide images): one product per tap, on a shifted view of the flattened image;
- native (stride 1, very few channels, such as RGB): MLX's own, since gathering such short rows takes longer;
- im2col (all others): windows gathered into rows, then one product;
- 1x1: a single product.

Eager calls run in parallel chunks (see `cpu.conv_parallel`), calls inside a trace in one step. Gradients use the same
algorithms: MLX's own input gradient of a stride-2 convolution costs fifty times the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mflux_vae.kernels import gpu_conv
from mflux_vae.kernels.activations import silu
from mflux_vae.kernels.cpu import conv_parallel, winograd
from mflux_vae.kernels.cpu.conv_algorithms import (
    Padding,
    choose_algorithm,
    convolve,
    flipped,
    normalize_padding,
    repeat_2x,
    weight_space_to_depth,
    zero_pad,
)
from mflux_vae.kernels.cpu.im2col import im2col
from mflux_vae.kernels.cpu.parallel import is_eager, streams
from mflux_vae.kernels.normalization import group_norm, group_norm_affine, group_norm_silu, rms_norm
from mflux_vae.kernels.overrides import overridable
from mflux_vae.runtime import device

_custom_function: Any = mx.custom_function  # MLX's stubs type its result as `object`


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
        stride: in both directions; strides above 2 use MLX's own convolution on every device.
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
    if not device.is_cpu() or stride > 2:
        y = (gpu_conv.native if device.is_cpu() else gpu_conv.conv2d)(x, weight, stride, sides)
        return y if bias is None else (y + bias).astype(y.dtype)
    if x.dtype != mx.float32:  # half-precision products are thirty times slower
        y = conv2d(x.astype(mx.float32), weight.astype(mx.float32), stride=stride, padding=padding).astype(x.dtype)
        return y if bias is None else y + bias
    if weight.shape[1:3] != (1, 1) and is_eager(x, weight):
        return conv_parallel.convolution(conv_parallel.array_rows(x), x.shape, weight, bias, stride, sides)
    x = zero_pad(x, sides)
    y = _conv_valid(*(_space_to_depth(x, weight) if stride == 2 else (x, weight)))
    return y if bias is None else y + bias


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
    """residual + conv2d(silu(group_norm(x, *norm)), weight, bias), fused on a CPU.

    Args:
        norm: groups, weight, bias and eps of `group_norm`.
        residual: same shape as the result, or None.
    """
    sides = normalize_padding(padding)
    if not _can_fuse(x, weight, residual, *norm[1:3]):
        y = group_norm_silu(x, *norm) if isinstance(x, mx.array) else silu(group_norm(x, *norm))
        y = conv2d(y.astype(weight.dtype) if device.is_cpu() else y, weight, bias, padding=padding)
        return y if residual is None else residual + y
    rows = conv_parallel.silu_rows(x, *group_norm_affine(x, *norm))
    return conv_parallel.convolution(rows, x.shape, weight, bias, 1, sides, residual)


@overridable
def rms_norm_silu_conv2d(
    x: mx.array,
    norm: tuple[mx.array, float],
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    padding: Padding = 0,
    residual: mx.array | None = None,
) -> mx.array:
    """residual + conv2d(silu(rms_norm(x, *norm)), weight, bias), fused on a CPU.

    Args:
        norm: weight and eps of `rms_norm`.
        residual: same shape as the result, or None.
    """
    if not _can_fuse(x, weight, residual, norm[0]):
        y = silu(rms_norm(x, *norm))
        y = conv2d(y.astype(weight.dtype) if device.is_cpu() else y, weight, bias, padding=padding)
        return y if residual is None else residual + y
    rows = conv_parallel.rms_silu_rows(x, *norm)
    return conv_parallel.convolution(rows, x.shape, weight, bias, 1, normalize_padding(padding), residual)


@overridable
def partial_conv2d(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, *, start: int = 0, padding: Padding = 0
) -> mx.array:
    """conv2d with those input channels of the weight that x has, from `start` on."""
    return conv2d(x, weight[..., start : start + x.shape[-1]], bias, padding=padding)


@overridable
def repeat_conv2d(x: mx.array, weight: mx.array, bias: mx.array | None = None, *, padding: Padding = 0) -> mx.array:
    """conv2d(upsample_nearest_2x(x), weight, bias), without storing the upsampled image."""
    if not _can_fuse(x, weight):
        return conv2d(upsample_nearest_2x(x), weight, bias, padding=padding)
    batch, height, width, channels = x.shape
    shape, rows = (batch, 2 * height, 2 * width, channels), conv_parallel.upsampled_rows(x)
    return conv_parallel.convolution(rows, shape, weight, bias, 1, normalize_padding(padding))


@overridable
def upsample_nearest_2x(x: mx.array) -> mx.array:
    """Nearest-neighbour upsampling by two. (B, H, W, C) -> (B, 2H, 2W, C)."""
    return repeat_2x(x)


FUSED = (norm_silu_conv2d, partial_conv2d, repeat_conv2d, rms_norm_silu_conv2d)
"""Functions whose `__wrapped__` runs step by step, for arguments that override operations."""


def _can_fuse(x: Any, *others: mx.array | None) -> bool:
    """Whether chunks can apply further functions to their rows: float32 arrays, evaluated eagerly."""
    arrays = [array for array in (x, *others) if array is not None]
    if any(not isinstance(array, mx.array) or array.dtype != mx.float32 for array in arrays):
        return False
    return is_eager(*arrays)


def workspace_bytes(shape: Sequence[int], weight: Sequence[int], stride: int = 1, *, intermediates: int = 0) -> int:
    """Estimate the peak memory (bytes) of a CPU convolution, besides its input and output.

    Every stream works on one chunk, and nearly all intermediate results of a chunk are alive together:

    - winograd, per tile: 16 input pixels with margins, the 36 values of its window twice, 36 output values, and the
      output pixels twice; plus the reordered and the transformed weights. If chunks are output channels, the
      transformed input comes first, then each chunk's share of the weights.
    - gemm_then_shift: the products of every tap, unpadded and padded, and their sum.
    - shifted_gemm: the padded rows, and the sum before and after a tap; half of the intermediates are freed by then.
    - native: rows, padded rows, gathered windows, and the result.
    - im2col: rows followed by zeros, gathered windows, and the result.

    Args:
        shape: input, (B, H, W, C).
        weight: (O, kh, kw, C).
        intermediates: arrays computed before a chunk's rows (`repeat_conv2d`: 1; with a norm: 2).
    """
    batch, height, width, channels = shape
    out, kh, kw, _ = weight
    if kh == kw == stride == 1:
        return 0
    taps, count = kh * kw, batch * -(-height // stride) * -(-width // stride)
    algorithm = choose_algorithm((kh, kw), stride, channels, out, count)
    step = winograd.TILE if algorithm == "winograd" else stride
    down, across = -(-height // step), -(-width // step)
    images, rows = conv_parallel.chunk_shape(algorithm, (batch, down, across), channels, out, taps)
    chunk_cells = min(streams() * images * rows, batch * down) * across
    if algorithm == "winograd":
        tiles, pixels = batch * down * across, winograd.TILE**2
        if conv_parallel.splits_channels(tiles, out):
            columns = streams() * conv_parallel.channels_per_chunk(channels, out)
            input_bytes = tiles * ((1 + intermediates) * pixels + 72) * channels
            return 4 * max(input_bytes, tiles * 36 * channels + columns * (68 * tiles + 45 * channels))
        pixels += -(-2 * winograd.TILE // rows)
        return 4 * (chunk_cells * (((1 + intermediates) * pixels + 72) * channels + 68 * out) + 45 * channels * out)
    input_values = stride**2 * channels  # input values per output pixel
    values = {
        "gemm_then_shift": 2 * taps * out + out,
        "shifted_gemm": input_values + 2 * out,
        "native": 2 * input_values + taps * channels + out,
        "im2col": input_values + taps * channels + out,
    }
    extra = intermediates * input_values // (2 if algorithm == "shifted_gemm" else 1)
    return 4 * chunk_cells * (values[algorithm] + extra)


def _space_to_depth(x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
    """Rewrite a stride-2 convolution as a stride-1 convolution over 2x2 blocks, whose gradients are convolutions."""
    batch, height, width, channels = x.shape
    _, kh, kw, _ = weight.shape
    # drop rows and columns that no window reaches; pad to whole blocks
    blocks_h, blocks_w = (height - kh) // 2 + (kh + 1) // 2, (width - kw) // 2 + (kw + 1) // 2
    x = x[:, : 2 * blocks_h, : 2 * blocks_w]
    x = mx.pad(x, [(0, 0), (0, 2 * blocks_h - x.shape[1]), (0, 2 * blocks_w - x.shape[2]), (0, 0)])
    x = x.reshape(batch, blocks_h, 2, blocks_w, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, blocks_h, blocks_w, 4 * channels), weight_space_to_depth(weight)


@_custom_function
def _conv_valid(x: mx.array, weight: mx.array) -> mx.array:
    """Convolution without padding, stride 1, with gradients."""
    return convolve(x, weight)


@_conv_valid.vjp
def _conv_valid_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _y: mx.array) -> tuple[mx.array, mx.array]:
    """Input gradient by convolution; weight gradient by one product over patches."""
    x, weight = primals
    out, kh, kw, _ = weight.shape
    padded_dy = zero_pad(cotangent, ((kh - 1, kh - 1), (kw - 1, kw - 1)))
    grad_x = _conv_valid(padded_dy, flipped(weight))
    grad_w = cotangent.reshape(-1, out).T @ im2col(x, (kh, kw), 1, (cotangent.shape[1], cotangent.shape[2]))
    return grad_x, grad_w.reshape(weight.shape)
