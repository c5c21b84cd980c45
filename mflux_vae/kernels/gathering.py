"""Windows of an image, gathered pixel by pixel.

A pixel's channels lie side by side, and `mx.take` moves them in one go: up to four times faster than a copy of
overlapping strides. Pixels outside the image come from a row of zeros behind it, so that nothing is padded.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

_FEW_CHANNELS = 64
"""With fewer, a copy of a window's rows is faster after all: its pixels lie side by side, too."""


def windows(
    x: mx.array,
    window: tuple[int, int],
    step: int,
    count: tuple[int, int],
    origin: tuple[int, int] = (0, 0),
    *,
    by_place: bool = False,
) -> mx.array:
    """Every window's pixels.

    Args:
        x: (B, H, W, C).
        window: height and width of one.
        step: from one to the next, down and across.
        count: of windows, down and across.
        origin: how far the first one begins above and to the left of the image.
        by_place: order by the place in the window first.

    Returns:
        (B * windows, pixels of a window * C); by place (pixels of a window, B * windows * C).
    """
    batch, height, width, channels = x.shape
    inside = not any(origin) and all(
        step * (n - 1) + k <= size for n, k, size in zip(count, window, x.shape[1:3], strict=False)
    )
    if inside and not by_place and channels < _FEW_CHANNELS:
        row = width * channels
        strides = (height * row, step * row, step * channels, row, 1)
        shape = (batch, *count, window[0], window[1] * channels)
        return mx.as_strided(mx.contiguous(x), shape, strides).reshape(-1, window[0] * shape[-1])
    flat = mx.concatenate([x.reshape(-1, channels), mx.zeros((1, channels), x.dtype)])
    pixels = mx.take(flat, _places((batch, height, width), window, step, count, origin, by_place), axis=0)
    size = window[0] * window[1]
    return pixels.reshape(size, -1) if by_place else pixels.reshape(-1, size * channels)


@lru_cache(maxsize=64)
def _places(
    shape: tuple[int, int, int],
    window: tuple[int, int],
    step: int,
    count: tuple[int, int],
    origin: tuple[int, int],
    by_place: bool,
) -> mx.array:
    """Numbers of pixels in the flattened image."""
    batch, height, width = shape
    rows, columns = (
        step * np.arange(n)[:, None] + np.arange(k) - before for n, k, before in zip(count, window, origin, strict=True)
    )
    images, rows, columns = np.arange(batch)[:, None, None, None, None], rows[:, None, :, None], columns[:, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    places = np.where(inside, (images * height + rows) * width + columns, batch * height * width)
    return mx.array((places.transpose(3, 4, 0, 1, 2) if by_place else places).reshape(-1).astype(np.uint32))
