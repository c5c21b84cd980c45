"""Two-dimensional convolution.

On a CPU one of six forms is chosen by shape (`_form`; `python -m benchmarks.convolutions` measures the choice):

- *Winograd* (3x3, stride 1, enough channels): a quarter of the products, see `winograd`;
- *taps last* (few output channels): one product of all pixels with all taps' weights, whose few results are then
  shifted and added;
- *shifts* (stride 1, few channels, wide images): a product per tap, of the flattened image from where the tap points;
- *MLX's own* (stride 1, fewer channels, as pictures have): what takes long is to gather such short pieces;
- *patches* (all others): windows gathered into rows, one product;
- 1x1: a product as it is.

In bands where results are computed at once (see `bands`), in one piece inside a trace. Gradients are convolutions and
products of the same kinds: MLX's own input gradient of a stride-2 convolution costs fifty times the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import mlx.core as mx

from mflux_vae import runtime
from mflux_vae.kernels import winograd
from mflux_vae.kernels.bands import computes_now, filled, streams
from mflux_vae.kernels.fusion import fused
from mflux_vae.kernels.gathering import windows
from mflux_vae.kernels.normalization import group_norm, group_norm_affine
from mflux_vae.kernels.pointwise import silu
from mflux_vae.overriding import overridable

Padding: TypeAlias = int | tuple[tuple[int, int], tuple[int, int]]
Sides: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""Zeros at ((top, bottom), (left, right))."""

Rows: TypeAlias = Callable[[slice, int, int], mx.array]
"""(images, start, stop) -> those images' rows start to stop of what is convolved, (b, stop - start, W, C)."""

_WINOGRAD_MIN_CHANNELS = 32
_SHIFTS_MIN_CHANNELS = 8
_SHIFTS_MIN_WIDTH = 12
"""Where rows are shorter, too much of what is multiplied runs over their ends."""
_TAPS_LAST_SHARE = 4
"""Taps last where input channels are so many times the output channels."""
_BAND_ELEMENTS = 1 << 21
"""Of the largest array that a band makes, so that it stays in the core's cache or near it."""
_REMEMBERED_MAX_PIXELS = 256
"""Transforming a weight takes 144 pixels' worth of products, remembering it four times its memory."""
_BAND_TILES = (64, 256)
"""Winograd's tiles in a band: fewer make thin matrices, more do not make faster ones."""

_custom_function: Any = mx.custom_function  # MLX's stubs say that calling one gives an `object`


@overridable
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
    (top, bottom), (left, right) = sides = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    height, width = x.shape[1] + top + bottom, x.shape[2] + left + right
    if height < weight.shape[1] or width < weight.shape[2] or x.shape[3] != weight.shape[3]:
        raise ValueError(
            f"no convolution of {x.shape} (B, H, W, C), {height} x {width} when padded, "
            f"with a kernel {weight.shape} (O, kh, kw, C)"
        )
    if not runtime.is_cpu() or stride > 2:
        if top == bottom and left == right:
            y = mx.conv2d(x, weight, stride=stride, padding=(top, left))
        else:
            y = mx.conv2d(_padded(x, sides), weight, stride=stride)
        return y if bias is None else y + bias
    if x.dtype != mx.float32:  # products of halves are thirty times slower
        y = conv2d(x.astype(mx.float32), weight.astype(mx.float32), stride=stride, padding=padding).astype(x.dtype)
        return y if bias is None else y + bias
    if weight.shape[1:3] != (1, 1) and computes_now(x, weight):
        return _in_bands(_rows_of(x), x.shape, weight, bias, stride, sides)
    x = _padded(x, sides)
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
    """residual + conv2d(silu(group_norm(x, *norm)), weight, bias), without a pass over memory for each.

    Args:
        norm: groups, weight, bias and eps, as of `group_norm`.
        residual: of the result's shape, or None.
    """
    sides = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    if not _fuses(x, weight, residual, *norm[1:3]):
        y = conv2d(silu(group_norm(x, *norm)).astype(weight.dtype), weight, bias, padding=padding)
        return y if residual is None else residual + y
    scale, shift = group_norm_affine(x, *norm)

    def rows(images: slice, start: int, stop: int) -> mx.array:
        return silu(_scaled_and_shifted(x[images, start:stop], scale[images], shift[images]))

    return _in_bands(rows, x.shape, weight, bias, 1, sides, residual)


@overridable
def repeat_conv2d(x: mx.array, weight: mx.array, bias: mx.array | None = None, *, padding: Padding = 0) -> mx.array:
    """conv2d(repeat_pixels(x), weight, bias), without the four times larger image in memory."""
    if not _fuses(x, weight):
        return conv2d(repeat_pixels(x), weight, bias, padding=padding)
    batch, height, width, channels = x.shape

    def rows(images: slice, start: int, stop: int) -> mx.array:
        first = start // 2
        repeated = repeat_pixels(x[images, first : (stop + 1) // 2])
        return repeated[:, start - 2 * first : stop - 2 * first]

    sides = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    return _in_bands(rows, (batch, 2 * height, 2 * width, channels), weight, bias, 1, sides)


@overridable
def repeat_pixels(x: mx.array) -> mx.array:
    """Nearest-neighbour upsampling by two. (B, H, W, C) -> (B, 2H, 2W, C)."""
    batch, height, width, channels = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


FUSED = (norm_silu_conv2d, repeat_conv2d)
"""Where a stand-in for an array is to be treated step by step, their `__wrapped__` does it."""


def _fuses(x: Any, *others: mx.array | None) -> bool:
    """Whether bands can take their rows through other functions: x is an array, no stand-in, and computed at once."""
    arrays = [array for array in (x, *others) if array is not None]
    if any(not isinstance(array, mx.array) or array.dtype != mx.float32 for array in arrays):
        return False
    return computes_now(*arrays)


Form: TypeAlias = Literal["winograd", "taps last", "shifts", "own", "patches"]


def _form(kernel: tuple[int, int], stride: int, channels: int, out: int) -> Form:
    """The fastest form of a shape, measured with MKL on two cores of an AVX-512 server."""
    if stride == 1 and out * _TAPS_LAST_SHARE <= channels and out <= 32:
        return "taps last"
    if kernel == (3, 3) and stride == 1 and min(channels, out) >= _WINOGRAD_MIN_CHANNELS:
        return "winograd"
    if stride == 1 and channels < _WINOGRAD_MIN_CHANNELS:
        return "shifts" if channels >= _SHIFTS_MIN_CHANNELS else "own"
    return "patches"


def _in_bands(
    rows: Rows,
    shape: tuple[int, ...],
    weight: mx.array,
    bias: mx.array | None,
    stride: int,
    sides: Sides,
    residual: mx.array | None = None,
) -> mx.array:
    """Convolution of an image (B, H, W, C) that is made row by row, float32, computed at once."""
    batch, height, width, channels = shape
    (top, bottom), (left, right) = sides
    out, kh, kw, _ = weight.shape
    out_h, out_w = (height + top + bottom - kh) // stride + 1, (width + left + right - kw) // stride + 1
    form = _form((kh, kw), stride, channels, out)
    outputs = out
    if form == "winograd":
        tiles = max(_BAND_TILES[0], min(_BAND_TILES[1], _BAND_ELEMENTS // (36 * max(channels, out))))
        images, at_once = _share(batch, _tiles(out_h), tiles // _tiles(out_w))
        at_once *= winograd.TILE
        if _shares_outputs(batch * _tiles(out_h) * _tiles(out_w), out):
            images, at_once, outputs = batch, out_h, -(-out // streams())
        pixels = batch * out_h * out_w
        kernel = winograd.remembered(weight) if pixels <= _REMEMBERED_MAX_PIXELS else None
        if kernel is None and outputs == out:  # else each band transforms its own outputs' weights
            kernel = winograd.transformed(weight)
    else:
        per_row = out_w * max(kh * kw * (out if form == "taps last" else channels), out)
        images, at_once = _share(batch, out_h, _BAND_ELEMENTS // per_row)

    def band(these: slice, start: int, stop: int, places: slice) -> mx.array:
        """Rows start to stop of the result."""
        first, end = start * stride - top, (stop - 1) * stride + kh - top
        x = rows(these, max(first, 0), max(min(end, height), 0))
        if form == "winograd":
            count = _tiles(stop - start), _tiles(out_w)
            w = winograd.transformed(weight[places]) if kernel is None else kernel[:, places]
            y = winograd.convolve(x, w, count, (max(-first, 0), left))
            y = mx.contiguous(y) if bias is None else _plus(y, bias[places])
            y = _uncut(y)[:, : stop - start, :out_w]
        else:
            y = _piece(x, weight, stride, ((max(-first, 0), max(end - height, 0)), (left, right)))
            y = y if bias is None else _plus(y, bias)
        return y if residual is None else _plus(residual[these, start:stop, :, places], y)

    def bands() -> Iterator[tuple[Any, Callable[[], mx.array]]]:
        for image in range(0, batch, images):
            these = slice(image, min(image + images, batch))
            for start in range(0, out_h, at_once):
                stop = min(start + at_once, out_h)
                for place in range(0, out, outputs):
                    places = slice(place, min(place + outputs, out))
                    yield (these, slice(start, stop), slice(None), places), partial(band, these, start, stop, places)

    y = mx.zeros((batch, out_h, out_w, out))
    mx.eval(y)
    return filled(y, bands())


def workspace_bytes(shape: Sequence[int], weight: Sequence[int], stride: int = 1) -> int:
    """Estimate of what a convolution on the CPU takes at most, besides its argument and its result.

    Every stream has a band, nearly all of whose steps' results are there at once. Winograd, for each tile: of the
    input its 16 pixels with margins, and the 36 places of its window, twice; of the output 36 places, and its pixels,
    nearly twice; and the weights, reordered and transformed. Shifts: the rows, padded too, and the sum before and after
    a tap. MLX's own: the gathered windows, and the sum before and after the bias. Else the gathered windows, and twice
    the rows they are of.

    Args:
        shape: of the argument, (B, H, W, C).
        weight: (O, kh, kw, C).
    """
    batch, height, width, channels = shape
    out, kh, kw, _ = weight
    side_by_side = streams()
    form = _form((kh, kw), stride, channels, out)
    if form == "winograd":
        tiles = max(_BAND_TILES[0], min(_BAND_TILES[1], _BAND_ELEMENTS // (36 * max(channels, out))))
        most = batch * -(-height // winograd.TILE) * -(-width // winograd.TILE)
        weights = 0 if batch * height * width <= _REMEMBERED_MAX_PIXELS else 45 * channels * out
        read = side_by_side * most if _shares_outputs(most, out) else min(side_by_side * tiles, most)
        return 4 * (read * 100 * channels + min(side_by_side * tiles, most) * 64 * out + weights)
    if form == "shifts":
        pixels = min(batch * height * width, side_by_side * _BAND_ELEMENTS // (kh * kw * channels))
        return 4 * pixels * (2 * channels + 2 * out)
    if form == "own":
        pixels = min(batch * height * width, side_by_side * _BAND_ELEMENTS // max(kh * kw * channels, out))
        return 4 * pixels * (kh * kw * channels + channels + 2 * out)
    gathered = batch * height * width // stride**2 * kh * kw * (out if form == "taps last" else channels)
    return round(4 * min(side_by_side * _BAND_ELEMENTS, gathered) * (1 + 2 * stride**2 / (kh * kw)))


def _shares_outputs(tiles: int, out: int) -> bool:
    """Whether bands are output channels and not rows: where Winograd's weights are the larger part."""
    return tiles <= min(_BAND_TILES[0], out // 2)


def _share(batch: int, rows: int, fit: int) -> tuple[int, int]:
    """Images and rows of a band where `fit` rows are the right number: several images, or a part of one.

    Parts are as many as keep all streams busy to the end.
    """
    if fit >= 2 * rows:
        return min(batch, fit // rows), rows
    pieces = round(rows / max(fit, 1))
    if pieces > 1:
        pieces = streams() * max(1, round(pieces / streams()))
    return 1, -(-rows // max(pieces, 1))


def _tiles(length: int) -> int:
    """How many of Winograd's tiles cover a length."""
    return -(-length // winograd.TILE)


def _uncut(y: mx.array) -> mx.array:
    """Tiles (B, h, 4, w, 4, O) -> (B, 4 h, 4 w, O)."""
    batch, down, tall, across, wide, out = y.shape
    return y.reshape(batch, down * tall, across * wide, out)


@fused
def _plus(x: mx.array, y: mx.array) -> mx.array:
    return x + y


@fused
def _scale_and_shift(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return x * scale + shift


def _scaled_and_shifted(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """By values for each image and channel, (B, C)."""
    return _scale_and_shift(x, scale[:, None, None], shift[:, None, None])


def _rows_of(x: mx.array) -> Rows:
    return lambda images, start, stop: x[images, start:stop]


def _padded(x: mx.array, sides: Sides) -> mx.array:
    return mx.pad(x, [(0, 0), *sides, (0, 0)]) if any(map(any, sides)) else x


def _piece(x: mx.array, weight: mx.array, stride: int = 1, sides: Sides = ((0, 0), (0, 0))) -> mx.array:
    """Convolution in one piece."""
    batch, height, width, channels = x.shape
    out, kh, kw, _ = weight.shape
    (top, bottom), (left, right) = sides
    out_h, out_w = (height + top + bottom - kh) // stride + 1, (width + left + right - kw) // stride + 1
    if kh == kw == stride == 1:
        return _padded(x, sides) @ weight.reshape(out, channels).T
    form = _form((kh, kw), stride, channels, out)
    if form == "winograd":
        y = winograd.convolve(x, winograd.transformed(weight), (_tiles(out_h), _tiles(out_w)), (top, left))
        return _uncut(y)[:, :out_h, :out_w]
    if form == "taps last":
        # (B, H, W, taps * O), of which each tap's is read where the tap points
        each = _padded(x @ weight.transpose(3, 1, 2, 0).reshape(channels, -1), sides)
        taps = [
            each[:, i : i + out_h, j : j + out_w, (i * kw + j) * out : (i * kw + j + 1) * out]
            for i in range(kh)
            for j in range(kw)
        ]
        return sum(taps[1:], taps[0])
    if form == "shifts" and out_w >= _SHIFTS_MIN_WIDTH:
        x = _padded(x, sides)
        _, height, width, _ = x.shape
        flat = x.reshape(-1, channels)
        rows = flat.shape[0] - (kh - 1) * width - (kw - 1)
        y = flat[:rows] @ weight[:, 0, 0].T
        for tap in range(1, kh * kw):
            i, j = divmod(tap, kw)
            start = i * width + j
            y = mx.addmm(y, flat[start : start + rows], weight[:, i, j].T)
        # what runs over a row's end is never read
        return mx.as_strided(y, (batch, out_h, out_w, out), (height * width * out, width * out, out, 1))
    if form == "own":
        return mx.conv2d(_padded(x, sides), weight, stride=stride)
    patches = windows(x, (kh, kw), stride, (out_h, out_w), (top, left))
    return (patches @ weight.reshape(out, -1).T).reshape(batch, out_h, out_w, out)


def _space_to_depth(x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
    """Rewrite a stride-2 convolution as a stride-1 one over 2x2 blocks, whose gradients are convolutions again."""
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
    """Convolution without padding, stride 1, with gradients."""
    return _piece(x, weight)


@_conv_valid.vjp
def _conv_valid_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _y: mx.array) -> tuple[mx.array, mx.array]:
    """The input's gradient is a convolution again, the weight's one product over patches."""
    x, weight = primals
    out, kh, kw, _ = weight.shape
    margin = _padded(cotangent, ((kh - 1, kh - 1), (kw - 1, kw - 1)))
    grad_x = _conv_valid(margin, weight[:, ::-1, ::-1].transpose(3, 1, 2, 0))
    grad_w = cotangent.reshape(-1, out).T @ windows(x, (kh, kw), 1, (cotangent.shape[1], cotangent.shape[2]))
    return grad_x, grad_w.reshape(weight.shape)
