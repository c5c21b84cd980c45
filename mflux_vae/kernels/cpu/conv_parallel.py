"""Convolution, and the gradient for its weight, in bands (see `bands`), of an image that is made row by row.

Winograd's form cuts large images into bands of rows, and small ones with many channels into bands of output channels:
there the transformed weights are the larger part, and are best used while they are still in the core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import mlx.core as mx

from mflux_vae.kernels.activations import silu
from mflux_vae.kernels.cpu import winograd
from mflux_vae.kernels.cpu.conv_algorithms import Form, Sides, flipped, form_of, in_one_piece, padded, repeated
from mflux_vae.kernels.cpu.fusion import fused
from mflux_vae.kernels.cpu.im2col import overlapped, windows
from mflux_vae.kernels.cpu.parallel import Band, added, cut, filled, streams
from mflux_vae.kernels.normalization import scale_and_shift

Rows: TypeAlias = Callable[[slice, int, int], mx.array]
"""(images, start, stop) -> those images' rows start to stop of what is convolved, (b, stop - start, W, C)."""

BAND_ELEMENTS = 1 << 21
"""Of the largest array that a band makes, so that it stays in the core's cache or near it."""
BAND_TILES = (64, 256)
"""Winograd's tiles in a band: fewer make thin matrices, more do not make faster ones."""
_BAND_WEIGHTS = 1 << 21
"""Elements of the transformed weights of a band of output channels."""
_GRADIENT_MIN_CHANNELS = 64
"""Of Winograd's form of a weight's gradient."""
_SHIFTS_CHANNELS = range(8, 128)
"""Of the input, for a weight's gradient tap by tap."""


def rows_of(x: mx.array) -> Rows:
    """Those of an array."""
    return lambda images, start, stop: x[images, start:stop]


def repeated_rows_of(x: mx.array) -> Rows:
    """Those of an image with every pixel four times."""

    def rows(images: slice, start: int, stop: int) -> mx.array:
        first = start // 2
        return repeated(x[images, first : (stop + 1) // 2])[:, start - 2 * first : stop - 2 * first]

    return rows


def silu_rows_of(x: mx.array, scale: mx.array, shift: mx.array) -> Rows:
    """Those of silu(x scale + shift), by values (B, C) for each image and channel."""

    def rows(images: slice, start: int, stop: int) -> mx.array:
        return silu(scale_and_shift(x[images, start:stop], scale[images, None, None], shift[images, None, None]))

    return rows


def convolution(
    rows: Rows,
    shape: tuple[int, ...],
    weight: mx.array,
    bias: mx.array | None,
    stride: int,
    sides: Sides,
    residual: mx.array | None = None,
    *,
    turned: bool = False,
) -> mx.array:
    """Convolution of an image (B, H, W, C) that is made row by row, float32, computed at once.

    Args:
        weight: (O, kh, kw, C).
        residual: added to the result; or None.
        turned: convolve with `flipped(weight)` instead; the image then has O channels.
    """
    batch, height, width, channels = shape
    (top, bottom), (left, right) = sides
    kh, kw = weight.shape[1:3]
    out = weight.shape[3 if turned else 0]
    out_h, out_w = (height + top + bottom - kh) // stride + 1, (width + left + right - kw) // stride + 1
    form = form_of((kh, kw), stride, channels, out, batch * out_h * out_w)
    every_image, every_row, every_output = slice(0, batch), slice(0, out_h), slice(0, out)

    def read(these: slice, lines: slice, beyond: int = 0) -> tuple[mx.array, tuple[int, int]]:
        """What some rows of the result see, and the rows of zeros above and below it."""
        first, end = lines.start * stride - top, (lines.stop - 1) * stride + kh - top + beyond
        return rows(these, max(first, 0), max(min(end, height), 0)), (max(-first, 0), max(end - height, 0))

    def in_tiles(these: slice, lines: slice) -> mx.array:
        x, (above, _) = read(these, lines, beyond=-(lines.stop - lines.start) % winograd.TILE)
        return winograd.tiles(x, (winograd.tiles_over(lines.stop - lines.start), across), (above, left))

    def from_tiles(x: mx.array, kernel: mx.array, these: slice, lines: slice, places: slice) -> mx.array:
        y = winograd.convolve(x, kernel, (winograd.tiles_over(lines.stop - lines.start), across))
        y = mx.contiguous(y) if bias is None else _plus(y, bias[places])
        y = winograd.uncut(y)[:, : lines.stop - lines.start, :out_w]
        return y if residual is None else _plus(residual[these, lines, :, places], y)

    def from_rows(kernel: mx.array, these: slice, lines: slice) -> mx.array:
        return from_tiles(in_tiles(these, lines), kernel, these, lines, every_output)

    def from_outputs(x: mx.array, places: slice) -> mx.array:
        return from_tiles(x, _transformed(weight, places, turned), every_image, every_row, places)

    def in_a_piece(these: slice, lines: slice) -> mx.array:
        x, zeros = read(these, lines)
        y = in_one_piece(x, weight, stride, (zeros, (left, right)))
        y = y if bias is None else _plus(y, bias)
        return y if residual is None else _plus(residual[these, lines], y)

    bands: Iterator[tuple[Any, Band]]
    if form == "winograd":
        down, across = winograd.tiles_over(out_h), winograd.tiles_over(out_w)
        if shares_outputs(batch * down * across, out):
            x = in_tiles(every_image, every_row)
            mx.eval(x)
            bands = (
                ((every_image, every_row, slice(None), places), partial(from_outputs, x, places))
                for places in cut(out, outputs_at_once(channels, out))
            )
        else:
            kernel = _transformed(weight, every_output, turned)
            images, tall = band_of(form, (batch, down, across), channels, out, kh * kw)
            rows_of_tiles = _rows(batch, out_h, images, tall * winograd.TILE)
            bands = ((index, partial(from_rows, kernel, *index)) for index in rows_of_tiles)
    else:
        weight = mx.contiguous(flipped(weight)) if turned else weight
        share = band_of(form, (batch, out_h, out_w), channels, out, kh * kw)
        bands = ((index, partial(in_a_piece, *index)) for index in _rows(batch, out_h, *share))
    return filled(mx.zeros((batch, out_h, out_w, out)), bands)


def _transformed(weight: mx.array, places: slice, turned: bool) -> mx.array:
    """The transformed weights of some output channels."""
    return winograd.transformed(weight[..., places] if turned else weight[places], turned=turned)


def band_of(form: Form, result: tuple[int, int, int], channels: int, out: int, taps: int) -> tuple[int, int]:
    """Images of a band of a `convolution`, and rows of each.

    Args:
        result: images, rows and columns of the result, of which channels are `out`; of Winograd's form its tiles.
    """
    batch, height, width = result
    if form == "winograd":
        fit = max(BAND_TILES[0], min(BAND_TILES[1], BAND_ELEMENTS // (36 * max(channels, out))))
    else:
        fit = BAND_ELEMENTS // max(taps * (out if form == "taps last" else channels), out)
    return _share(batch, height, fit // width)


def shares_outputs(tiles: int, out: int) -> bool:
    """Whether bands are output channels and not rows: where Winograd's weights are the larger part."""
    return tiles <= min(BAND_TILES[0], out // 2)


def outputs_at_once(channels: int, out: int) -> int:
    """Output channels of a band where bands are those."""
    return _even(out, _BAND_WEIGHTS // (36 * channels))


def weight_gradient(
    rows: Rows, shape: tuple[int, ...], dy: mx.array, kernel: tuple[int, int], stride: int, sides: Sides
) -> mx.array:
    """Gradient for the weight of a `convolution`, (O, kh, kw, C).

    Args:
        dy: gradient for the result, (B, h, w, O).
    """
    batch, height, width, channels = shape
    (top, _), (left, right) = sides
    _, out_h, out_w, out = dy.shape
    kh, kw = kernel
    everything = slice(0, batch)
    if kernel == (1, 1) and stride == 1 and not any(map(any, sides)):
        x = rows(everything, 0, height).reshape(-1, channels)
        return (dy.reshape(-1, out).T @ x).reshape(out, 1, 1, channels)
    form = form_of(kernel, stride, channels, out, batch * out_h * out_w)
    if form == "winograd" and min(channels, out) >= _GRADIENT_MIN_CHANNELS:
        return _winograd_weight_gradient(rows, shape, dy, (top, left))
    if form == "taps last":
        return _few_outputs_weight_gradient(rows, shape, dy, kernel, sides)
    if stride == 1 and channels in _SHIFTS_CHANNELS:
        # a product per tap of the flattened images, from where the tap points; zeros where rows run over their ends
        x = padded(rows(everything, 0, height), sides).reshape(-1, channels)
        wide = padded(dy, ((0, kh - 1), (0, kw - 1))).reshape(-1, out).T
        starts = [i * (width + left + right) + j for i in range(kh) for j in range(kw)]
        taps = [wide[:, : x.shape[0] - start] @ x[start:] for start in starts]
        return mx.stack(taps, axis=1).reshape(out, kh, kw, channels)

    def band(these: slice, lines: slice) -> mx.array:
        first, end = lines.start * stride - top, (lines.stop - 1) * stride + kh - top
        x = rows(these, max(first, 0), max(min(end, height), 0))
        gathered = windows(x, kernel, stride, (lines.stop - lines.start, out_w), (max(-first, 0), left))
        return dy[these, lines].reshape(-1, out).T @ gathered

    share = _share(batch, out_h, BAND_ELEMENTS // (out_w * kh * kw * channels))
    return added(partial(band, *index) for index in _rows(batch, out_h, *share)).reshape(out, kh, kw, channels)


def input_gradient(dy: mx.array, weight: mx.array, shape: tuple[int, ...], stride: int, sides: Sides) -> mx.array:
    """Gradient for the input, (B, H, W, C), of a `convolution`: windows, each a product of dy, over each other.

    Args:
        dy: gradient for the result, (B, h, w, O).
    """
    batch, height, width, channels = shape
    out, kh, kw, _ = weight.shape
    (top, _), (left, _) = sides
    _, out_h, out_w, _ = dy.shape
    matrix = weight.reshape(out, -1)

    def band(these: slice, lines: slice) -> mx.array:
        first, end = max(-((kh - 1 - top - lines.start) // stride), 0), min((lines.stop - 1 + top) // stride + 1, out_h)
        given = dy[these, first:end].reshape(-1, out)
        x = mx.concatenate([given, mx.zeros((1, out))]) @ matrix
        part = these.stop - these.start, lines.stop - lines.start, width
        origin = top + lines.start - first * stride, left
        return overlapped(x, (kh, kw), stride, (max(end - first, 0), out_w), part, origin)

    share = _share(batch, height, BAND_ELEMENTS // (width * kh * kw * channels))
    return filled(mx.zeros(shape), ((index, partial(band, *index)) for index in _rows(batch, height, *share)))


def _few_outputs_weight_gradient(
    rows: Rows, shape: tuple[int, ...], dy: mx.array, kernel: tuple[int, int], sides: Sides
) -> mx.array:
    """`weight_gradient` with stride 1 and few output channels: windows of the gradient, which are small, not of x."""
    (batch, height, width, channels), ((top, _), (left, right)) = shape, sides
    _, out_h, _, out = dy.shape
    kh, kw = kernel

    def band(these: slice, lines: slice) -> mx.array:
        """Of rows of x: what their pixels contribute to, tap by tap, the last tap first."""
        first, end = lines.start - (kh - 1 - top), lines.stop + top
        given = dy[these, max(first, 0) : max(min(end, out_h), 0)]
        beyond = (max(-first, 0), end - first - given.shape[1] - max(-first, 0)), (kw - 1 - left, kw - 1 - right)
        seen = windows(padded(given, beyond), kernel, 1, (lines.stop - lines.start, width))
        return seen.T @ rows(these, lines.start, lines.stop).reshape(-1, channels)

    share = _share(batch, height, BAND_ELEMENTS // (width * max(channels, kh * kw * out)))
    taps = added(partial(band, *index) for index in _rows(batch, height, *share)).reshape(kh, kw, out, channels)
    return taps[::-1, ::-1].transpose(2, 0, 1, 3)


def _winograd_weight_gradient(rows: Rows, shape: tuple[int, ...], dy: mx.array, origin: tuple[int, int]) -> mx.array:
    """`weight_gradient` of a 3x3 convolution, stride 1: Winograd's formula, read backwards."""
    (batch, height, _, channels), (top, left) = shape, origin
    _, out_h, out_w, out = dy.shape
    down, across = winograd.tiles_over(out_h), winograd.tiles_over(out_w)

    def in_tiles(these: slice, lines: slice) -> mx.array:
        tall, first = winograd.tiles_over(lines.stop - lines.start), lines.start - top
        x = rows(these, max(first, 0), max(min(first + winograd.TILE * tall + 2, height), 0))
        return winograd.tiles(x, (tall, across), (max(-first, 0), left))

    def places(these: slice, lines: slice, channels: slice = slice(None)) -> mx.array:
        count = winograd.tiles_over(lines.stop - lines.start), across
        return winograd.result_tiles(dy[these, lines, :, channels], count)

    if shares_outputs(batch * down * across, out):
        whole = slice(0, batch), slice(0, out_h)
        x = in_tiles(*whole)
        mx.eval(x)

        def of_channels(some: slice) -> mx.array:
            return winograd.weight_from_places(winograd.weight_gradient(x, places(*whole, some)))

        parts = cut(out, outputs_at_once(channels, out))
        return filled(mx.zeros((out, 3, 3, channels)), ((part, partial(of_channels, part)) for part in parts))

    images, tall = _share(batch, down, BAND_TILES[1] // across)
    bands = (
        lambda index=index: winograd.weight_gradient(in_tiles(*index), places(*index))
        for index in _rows(batch, out_h, images, tall * winograd.TILE)
    )
    return winograd.weight_from_places(added(bands))


def _rows(batch: int, rows: int, images: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """(images, rows) of each band."""
    return product(cut(batch, images), cut(rows, at_once))


def _share(batch: int, rows: int, fit: int) -> tuple[int, int]:
    """Images and rows of a band where `fit` rows are the right number: several images, or a part of one."""
    if batch >= streams() and fit >= rows:
        return min(-(-batch // streams()), fit // rows), rows
    return 1, _even(rows, fit)


def _even(length: int, fit: int) -> int:
    """About `fit`, so that all streams are busy to the end."""
    rounds = max(1, round(length / max(fit, 1) / streams()))
    return -(-length // (streams() * rounds))


@fused
def _plus(x: mx.array, y: mx.array) -> mx.array:
    return x + y
