"""Gather the windows of an image (im2col), and sum windows back into an image (col2im).

The channels of a pixel are contiguous, so `mx.take` moves them together: up to four times faster than copying
overlapping strides. Pixels outside the image are read from a row of zeros behind it, which avoids padding.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

_STRIDED_COPY_MAX_CHANNELS = 64
"""Below this many channels, a strided copy of window rows is faster."""


def im2col(
    x: mx.array,
    window: tuple[int, int],
    step: int,
    count: tuple[int, int],
    origin: tuple[int, int] = (0, 0),
    *,
    position_first: bool = False,
) -> mx.array:
    """Gather the pixels of every window.

    Args:
        x: (B, H, W, C).
        window: height and width of a window.
        step: distance between windows, in both directions.
        count: windows, down and across.
        origin: rows and columns by which the first window starts above and left of the image.
        position_first: put the position within the window on the first axis.

    Returns:
        (B * windows, pixels per window * C); if position_first, (pixels per window, B * windows * C).
    """
    batch, height, width, channels = x.shape
    inside = not any(origin) and all(
        step * (n - 1) + k <= size for n, k, size in zip(count, window, x.shape[1:3], strict=False)
    )
    if inside and not position_first and channels < _STRIDED_COPY_MAX_CHANNELS:
        row = width * channels
        strides = (height * row, step * row, step * channels, row, 1)
        shape = (batch, *count, window[0], window[1] * channels)
        return mx.as_strided(mx.contiguous(x), shape, strides).reshape(-1, window[0] * shape[-1])
    flat = mx.concatenate([x.reshape(-1, channels), mx.zeros((1, channels), x.dtype)])
    pixels = mx.take(flat, _pixel_indices((batch, height, width), window, step, count, origin, position_first), axis=0)
    size = window[0] * window[1]
    return pixels.reshape(size, -1) if position_first else pixels.reshape(-1, size * channels)


@lru_cache(maxsize=64)
def _pixel_indices(
    shape: tuple[int, int, int],
    window: tuple[int, int],
    step: int,
    count: tuple[int, int],
    origin: tuple[int, int],
    position_first: bool,
) -> mx.array:
    """Indices of the windows' pixels in the flattened images."""
    batch, height, width = shape
    rows, columns = (
        step * np.arange(n)[:, None] + np.arange(k) - before for n, k, before in zip(count, window, origin, strict=True)
    )
    images, rows, columns = np.arange(batch)[:, None, None, None, None], rows[:, None, :, None], columns[:, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    indices = np.where(inside, (images * height + rows) * width + columns, batch * height * width)
    return mx.array((indices.transpose(3, 4, 0, 1, 2) if position_first else indices).reshape(-1).astype(np.uint32))


def col2im(
    x: mx.array,
    window: tuple[int, int],
    step: int,
    count: tuple[int, int],
    image: tuple[int, int, int],
    origin: tuple[int, int] = (0, 0),
) -> mx.array:
    """Sum windows at every pixel of an image: the gradient of `im2col`.

    Args:
        x: (B * windows + 1, pixels per window * C); the last row must be zeros.
        window, step, count, origin: as in `im2col`.
        image: B, H and W.

    Returns:
        (B, H, W, C).
    """
    pixels = x.reshape(-1, x.shape[1] // (window[0] * window[1]))
    indices = _window_indices(image, window, step, count, origin)
    return mx.take(pixels, indices, axis=0).sum(axis=0).reshape(*image, -1)


@lru_cache(maxsize=64)
def _window_indices(
    image: tuple[int, int, int],
    window: tuple[int, int],
    step: int,
    count: tuple[int, int],
    origin: tuple[int, int],
) -> mx.array:
    """Indices of the window pixels that cover each image pixel, (most windows per pixel, B * H * W)."""
    batch, height, width = image
    axes = []
    for size, k, n, before in zip((height, width), window, count, origin, strict=True):
        positions = np.arange(before, before + size)
        offset = positions % step + step * np.arange(-(-k // step))[:, None]
        number = (positions - offset) // step
        axes.append((offset, number, (offset < k) & (number >= 0) & (number < n)))
    rows, columns = ([part[:, None, None, :, None] for part in axes[0]], [part[:, None, None] for part in axes[1]])
    (i, down, inside), (j, across, inside_across) = rows, columns
    images = np.arange(batch)[:, None, None]
    indices = (((images * count[0] + down) * count[1] + across) * window[0] + i) * window[1] + j
    indices = np.where(inside & inside_across, indices, batch * count[0] * count[1] * window[0] * window[1])
    return mx.array(indices.reshape(-1, batch * height * width).astype(np.uint32))
