"""Convolution and its gradients in parallel chunks (see `cpu.parallel`), of images whose rows are computed on demand.

Winograd splits large images into chunks of rows. It splits small images with many channels into chunks of output
channels, because there the transformed weights are the larger part and should stay in the core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import mlx.core as mx

from mflux_vae.kernels.activations import silu
from mflux_vae.kernels.cpu import winograd
from mflux_vae.kernels.cpu.conv_algorithms import (
    Algorithm,
    Sides,
    choose_algorithm,
    convolve,
    flipped,
    repeat_2x,
    zero_pad,
)
from mflux_vae.kernels.cpu.fusion import fused
from mflux_vae.kernels.cpu.im2col import col2im, im2col
from mflux_vae.kernels.cpu.parallel import Chunk, fill_parallel, slices, streams, sum_parallel
from mflux_vae.kernels.normalization import rms_norm, scale_and_shift

ReadRows: TypeAlias = Callable[[slice, int, int], mx.array]
"""(samples, start, stop) -> rows start to stop of the convolution's input, (b, stop - start, W, C)."""

CHUNK_ELEMENTS = 1 << 21
"""Elements of the largest array of a chunk, so that it stays in or near the core's cache."""
CHUNK_TILES = (64, 256)
"""Fewest and most Winograd tiles of a chunk: fewer give thin matrices, more are not faster."""
_CHUNK_WEIGHTS = 1 << 21
"""Elements of the transformed weights in a chunk of output channels."""
_WINOGRAD_GRADIENT_MIN_CHANNELS = 64
"""Fewest channels for Winograd weight gradients."""
_SHIFTED_GEMM_CHANNELS = range(8, 128)
"""Input channels for which the weight gradient is computed tap by tap."""


def array_rows(x: mx.array) -> ReadRows:
    """Read the rows of an array."""
    return lambda images, start, stop: x[images, start:stop]


def upsampled_rows(x: mx.array) -> ReadRows:
    """Read the rows of an image upsampled by two (nearest neighbor)."""

    def rows(images: slice, start: int, stop: int) -> mx.array:
        first = start // 2
        return repeat_2x(x[images, first : (stop + 1) // 2])[:, start - 2 * first : stop - 2 * first]

    return rows


def silu_rows(x: mx.array, scale: mx.array, shift: mx.array) -> ReadRows:
    """Read the rows of silu(x * scale + shift); scale, shift: (B, C)."""

    def rows(images: slice, start: int, stop: int) -> mx.array:
        return silu(scale_and_shift(x[images, start:stop], scale[images, None, None], shift[images, None, None]))

    return rows


def rms_silu_rows(x: mx.array, weight: mx.array, eps: float) -> ReadRows:
    """Read the rows of silu(rms_norm(x, weight, eps)); weight: (C,)."""
    return lambda images, start, stop: silu(rms_norm(x[images, start:stop], weight, eps))


def convolution(
    rows: ReadRows,
    shape: tuple[int, ...],
    weight: mx.array,
    bias: mx.array | None,
    stride: int,
    sides: Sides,
    residual: mx.array | None = None,
    *,
    flip: bool = False,
) -> mx.array:
    """Convolve an image whose rows are computed on demand; float32, eager.

    Args:
        rows: reads rows of the input.
        shape: input, (B, H, W, C).
        weight: (O, kh, kw, C).
        residual: added to the result, or None.
        flip: convolve with `flipped(weight)`; the input then has O channels.
    """
    batch, height, width, channels = shape
    (top, bottom), (left, right) = sides
    kh, kw = weight.shape[1:3]
    out = weight.shape[3 if flip else 0]
    out_h, out_w = (height + top + bottom - kh) // stride + 1, (width + left + right - kw) // stride + 1
    algorithm = choose_algorithm((kh, kw), stride, channels, out, batch * out_h * out_w)
    all_images, all_rows, all_channels = slice(0, batch), slice(0, out_h), slice(0, out)

    def read(samples: slice, lines: slice, extra: int = 0) -> tuple[mx.array, tuple[int, int]]:
        """Input rows of some output rows, and the numbers of zero rows above and below them."""
        first, end = lines.start * stride - top, (lines.stop - 1) * stride + kh - top + extra
        return rows(samples, max(first, 0), max(min(end, height), 0)), (max(-first, 0), max(end - height, 0))

    def input_tiles(samples: slice, lines: slice) -> mx.array:
        x, (above, _) = read(samples, lines, extra=-(lines.stop - lines.start) % winograd.TILE)
        return winograd.transform_input(x, (winograd.tile_count(lines.stop - lines.start), across), (above, left))

    def output_of_tiles(x: mx.array, kernel: mx.array, samples: slice, lines: slice, channel_slice: slice) -> mx.array:
        y = winograd.convolve(x, kernel, (winograd.tile_count(lines.stop - lines.start), across))
        y = mx.contiguous(y) if bias is None else _add(y, bias[channel_slice])
        y = winograd.join_tiles(y)[:, : lines.stop - lines.start, :out_w]
        return y if residual is None else _add(residual[samples, lines, :, channel_slice], y)

    def chunk_of_rows(kernel: mx.array, samples: slice, lines: slice) -> mx.array:
        return output_of_tiles(input_tiles(samples, lines), kernel, samples, lines, all_channels)

    def chunk_of_channels(x: mx.array, channel_slice: slice) -> mx.array:
        return output_of_tiles(x, _transform_weight(weight, channel_slice, flip), all_images, all_rows, channel_slice)

    def chunk_untransformed(samples: slice, lines: slice) -> mx.array:
        x, zeros = read(samples, lines)
        y = convolve(x, weight, stride, (zeros, (left, right)))
        y = y if bias is None else _add(y, bias)
        return y if residual is None else _add(residual[samples, lines], y)

    chunks: Iterator[tuple[Any, Chunk]]
    if algorithm == "winograd":
        down, across = winograd.tile_count(out_h), winograd.tile_count(out_w)
        if splits_channels(batch * down * across, out):
            x = input_tiles(all_images, all_rows)
            mx.eval(x)
            chunks = (
                ((all_images, all_rows, slice(None), channel_slice), partial(chunk_of_channels, x, channel_slice))
                for channel_slice in slices(out, channels_per_chunk(channels, out))
            )
        else:
            kernel = _transform_weight(weight, all_channels, flip)
            images, chunk_rows = chunk_shape(algorithm, (batch, down, across), channels, out, kh * kw)
            rows_of_tiles = _row_chunks(batch, out_h, images, chunk_rows * winograd.TILE)
            chunks = ((index, partial(chunk_of_rows, kernel, *index)) for index in rows_of_tiles)
    else:
        weight = mx.contiguous(flipped(weight)) if flip else weight
        share = chunk_shape(algorithm, (batch, out_h, out_w), channels, out, kh * kw)
        chunks = ((index, partial(chunk_untransformed, *index)) for index in _row_chunks(batch, out_h, *share))
    return fill_parallel(mx.zeros((batch, out_h, out_w, out)), chunks)


def _transform_weight(weight: mx.array, channel_slice: slice, flip: bool) -> mx.array:
    """Transform the weights of some output channels for Winograd."""
    return winograd.transform_weight(weight[..., channel_slice] if flip else weight[channel_slice], flip=flip)


def chunk_shape(
    algorithm: Algorithm, result: tuple[int, int, int], channels: int, out: int, taps: int
) -> tuple[int, int]:
    """Images per chunk of a `convolution`, and rows of each.

    Args:
        result: images, rows and columns of the output; for Winograd, in tiles.
        channels, out: input and output channels.
        taps: kh * kw.
    """
    batch, height, width = result
    if algorithm == "winograd":
        fit = max(CHUNK_TILES[0], min(CHUNK_TILES[1], CHUNK_ELEMENTS // (36 * max(channels, out))))
    else:
        fit = CHUNK_ELEMENTS // max(taps * (out if algorithm == "gemm_then_shift" else channels), out)
    return _images_and_rows(batch, height, fit // width)


def splits_channels(tiles: int, out: int) -> bool:
    """Whether Winograd chunks are output channels instead of rows, as the weights are the larger part."""
    return tiles <= min(CHUNK_TILES[0], out // 2)


def channels_per_chunk(channels: int, out: int) -> int:
    """Output channels per chunk, if `splits_channels`."""
    return _even_size(out, _CHUNK_WEIGHTS // (36 * channels))


def weight_gradient(
    rows: ReadRows, shape: tuple[int, ...], dy: mx.array, kernel: tuple[int, int], stride: int, sides: Sides
) -> mx.array:
    """Gradient for the weight of a `convolution`, (O, kh, kw, C).

    Args:
        dy: gradient of the output, (B, h, w, O).
    """
    batch, height, width, channels = shape
    (top, _), (left, right) = sides
    _, out_h, out_w, out = dy.shape
    kh, kw = kernel
    all_images = slice(0, batch)
    if kernel == (1, 1) and stride == 1 and not any(map(any, sides)):
        x = rows(all_images, 0, height).reshape(-1, channels)
        return (dy.reshape(-1, out).T @ x).reshape(out, 1, 1, channels)
    algorithm = choose_algorithm(kernel, stride, channels, out, batch * out_h * out_w)
    if algorithm == "winograd" and min(channels, out) >= _WINOGRAD_GRADIENT_MIN_CHANNELS:
        return _winograd_weight_gradient(rows, shape, dy, (top, left))
    if algorithm == "gemm_then_shift":
        return _few_outputs_weight_gradient(rows, shape, dy, kernel, sides)
    if stride == 1 and channels in _SHIFTED_GEMM_CHANNELS:
        # one product per tap of the flattened images at its offset; zeros where a row's end wraps around
        x = zero_pad(rows(all_images, 0, height), sides).reshape(-1, channels)
        wide = zero_pad(dy, ((0, kh - 1), (0, kw - 1))).reshape(-1, out).T
        starts = [i * (width + left + right) + j for i in range(kh) for j in range(kw)]
        taps = [wide[:, : x.shape[0] - start] @ x[start:] for start in starts]
        return mx.stack(taps, axis=1).reshape(out, kh, kw, channels)

    def chunk(samples: slice, lines: slice) -> mx.array:
        first, end = lines.start * stride - top, (lines.stop - 1) * stride + kh - top
        x = rows(samples, max(first, 0), max(min(end, height), 0))
        gathered = im2col(x, kernel, stride, (lines.stop - lines.start, out_w), (max(-first, 0), left))
        return dy[samples, lines].reshape(-1, out).T @ gathered

    share = _images_and_rows(batch, out_h, CHUNK_ELEMENTS // (out_w * kh * kw * channels))
    return sum_parallel(partial(chunk, *index) for index in _row_chunks(batch, out_h, *share)).reshape(
        out, kh, kw, channels
    )


def input_gradient(dy: mx.array, weight: mx.array, shape: tuple[int, ...], stride: int, sides: Sides) -> mx.array:
    """Gradient for the input of a `convolution`, (B, H, W, C): col2im of dy times the weights.

    Args:
        dy: gradient of the output, (B, h, w, O).
    """
    batch, height, width, channels = shape
    out, kh, kw, _ = weight.shape
    (top, _), (left, _) = sides
    _, out_h, out_w, _ = dy.shape
    matrix = weight.reshape(out, -1)

    def chunk(samples: slice, lines: slice) -> mx.array:
        first, end = max(-((kh - 1 - top - lines.start) // stride), 0), min((lines.stop - 1 + top) // stride + 1, out_h)
        dy_rows = dy[samples, first:end].reshape(-1, out)
        x = mx.concatenate([dy_rows, mx.zeros((1, out))]) @ matrix
        part = samples.stop - samples.start, lines.stop - lines.start, width
        origin = top + lines.start - first * stride, left
        return col2im(x, (kh, kw), stride, (max(end - first, 0), out_w), part, origin)

    share = _images_and_rows(batch, height, CHUNK_ELEMENTS // (width * kh * kw * channels))
    return fill_parallel(
        mx.zeros(shape), ((index, partial(chunk, *index)) for index in _row_chunks(batch, height, *share))
    )


def _few_outputs_weight_gradient(
    rows: ReadRows, shape: tuple[int, ...], dy: mx.array, kernel: tuple[int, int], sides: Sides
) -> mx.array:
    """`weight_gradient` for stride 1 and few output channels: gathers the (small) windows of dy."""
    (batch, height, width, channels), ((top, _), (left, right)) = shape, sides
    _, out_h, _, out = dy.shape
    kh, kw = kernel

    def chunk(samples: slice, lines: slice) -> mx.array:
        """Contribution of some rows of x, (kh * kw * O, C), taps in reverse order."""
        first, end = lines.start - (kh - 1 - top), lines.stop + top
        dy_rows = dy[samples, max(first, 0) : max(min(end, out_h), 0)]
        extra = (max(-first, 0), end - first - dy_rows.shape[1] - max(-first, 0)), (kw - 1 - left, kw - 1 - right)
        seen = im2col(zero_pad(dy_rows, extra), kernel, 1, (lines.stop - lines.start, width))
        return seen.T @ rows(samples, lines.start, lines.stop).reshape(-1, channels)

    share = _images_and_rows(batch, height, CHUNK_ELEMENTS // (width * max(channels, kh * kw * out)))
    taps = sum_parallel(partial(chunk, *index) for index in _row_chunks(batch, height, *share)).reshape(
        kh, kw, out, channels
    )
    return taps[::-1, ::-1].transpose(2, 0, 1, 3)


def _winograd_weight_gradient(
    rows: ReadRows, shape: tuple[int, ...], dy: mx.array, origin: tuple[int, int]
) -> mx.array:
    """`weight_gradient` of a 3x3 convolution with stride 1: the transpose of the Winograd transforms."""
    (batch, height, _, channels), (top, left) = shape, origin
    _, out_h, out_w, out = dy.shape
    down, across = winograd.tile_count(out_h), winograd.tile_count(out_w)

    def input_tiles(samples: slice, lines: slice) -> mx.array:
        chunk_rows, first = winograd.tile_count(lines.stop - lines.start), lines.start - top
        x = rows(samples, max(first, 0), max(min(first + winograd.TILE * chunk_rows + 2, height), 0))
        return winograd.transform_input(x, (chunk_rows, across), (max(-first, 0), left))

    def gradient_tiles(samples: slice, lines: slice, channels: slice = slice(None)) -> mx.array:
        count = winograd.tile_count(lines.stop - lines.start), across
        return winograd.transform_gradient(dy[samples, lines, :, channels], count)

    if splits_channels(batch * down * across, out):
        everything = slice(0, batch), slice(0, out_h)
        x = input_tiles(*everything)
        mx.eval(x)

        def chunk_of_channels(channel_slice: slice) -> mx.array:
            return winograd.untransform_weight_gradient(
                winograd.weight_gradient(x, gradient_tiles(*everything, channel_slice))
            )

        parts = slices(out, channels_per_chunk(channels, out))
        return fill_parallel(
            mx.zeros((out, 3, 3, channels)), ((part, partial(chunk_of_channels, part)) for part in parts)
        )

    images, chunk_rows = _images_and_rows(batch, down, CHUNK_TILES[1] // across)
    chunks = (
        lambda index=index: winograd.weight_gradient(input_tiles(*index), gradient_tiles(*index))
        for index in _row_chunks(batch, out_h, images, chunk_rows * winograd.TILE)
    )
    return winograd.untransform_weight_gradient(sum_parallel(chunks))


def _row_chunks(batch: int, rows: int, images: int, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices (images, rows) of each chunk."""
    return product(slices(batch, images), slices(rows, chunk_rows))


def _images_and_rows(batch: int, rows: int, fit: int) -> tuple[int, int]:
    """Images and rows of a chunk of about `fit` rows: several images, or a part of one."""
    if batch >= streams() and fit >= rows:
        return min(-(-batch // streams()), fit // rows), rows
    return 1, _even_size(rows, fit)


def _even_size(length: int, fit: int) -> int:
    """A chunk length near `fit` that keeps all streams busy to the end."""
    rounds = max(1, round(length / max(fit, 1) / streams()))
    return -(-length // (streams() * rounds))


@fused
def _add(x: mx.array, y: mx.array) -> mx.array:
    return x + y
