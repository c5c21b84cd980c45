"""Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016): 3x3 convolution with a quarter of the
multiplications.

Tiles of 6x6 pixels with a step of four give 4x4 outputs: y = A' [(G w G') * (B' x B)] A, with one C by O matrix
product at each of the 36 positions. The transforms are linear in the values of a tile (a 36x36 and a 16x36 matrix), so
all three steps are matrix products. The relative error is 1e-5.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from mflux_vae.kernels.cpu.im2col import im2col

TILE = 4
_WINDOW = TILE + 2

# the interpolation points are 0, 1, -1, 2, -2 and infinity
_B = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0]]
_B += [[0, 4, 0, -5, 0, 1]]
_G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6]]
_G += [[1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
_A = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


@cache
def _matrices() -> tuple[mx.array, mx.array, mx.array]:
    """Transforms of pixels (36, 36), weights (36, 9) and outputs (16, 36)."""
    pixels, weights, results = (mx.array(np.kron(m, m).astype(np.float32)) for m in map(np.array, (_B, _G, _A)))
    mx.eval(pixels, weights, results)
    return pixels, weights, results


def transform_weight(weight: mx.array, *, flip: bool = False) -> mx.array:
    """(O, 3, 3, C) -> (36, O, C): weights at the 36 positions; with flip, (36, C, O) for `flipped(weight)`."""
    out, _, _, channels = weight.shape
    transform = _matrices()[1][:, ::-1] if flip else _matrices()[1]
    values = (transform @ weight.transpose(1, 2, 0, 3).reshape(9, -1)).reshape(-1, out, channels)
    return values.swapaxes(1, 2) if flip else values


def transform_input(x: mx.array, count: tuple[int, int], origin: tuple[int, int] = (0, 0)) -> mx.array:
    """Transform the tiles of an image.

    Args:
        x: (B, H, W, C).
        count: tiles, down (h) and across (w).
        origin: zero rows above and zero columns left of the image; zeros below and right fill the last tiles.

    Returns:
        (36, B h w, C).
    """
    pixels = im2col(x, (_WINDOW, _WINDOW), TILE, count, origin, position_first=True)
    return (_matrices()[0] @ pixels).reshape(_WINDOW * _WINDOW, -1, x.shape[3])


def convolve(x: mx.array, weight: mx.array, count: tuple[int, int]) -> mx.array:
    """Convolve the result of `transform_input`, (36, B h w, C), with that of `transform_weight`, (36, O, C).

    Args:
        count: tiles, h and w.

    Returns:
        (B, h, 4, w, 4, O), a view; see `join_tiles`.
    """
    products = x @ weight.swapaxes(1, 2)
    y = _matrices()[2] @ products.reshape(_WINDOW * _WINDOW, -1)
    return y.reshape(TILE, TILE, -1, *count, weight.shape[1]).transpose(2, 3, 0, 4, 1, 5)


def join_tiles(y: mx.array) -> mx.array:
    """Tiles (B, h, 4, w, 4, O) -> (B, 4 h, 4 w, O)."""
    batch, down, tall, across, wide, out = y.shape
    return y.reshape(batch, down * tall, across * wide, out)


def tile_count(length: int) -> int:
    """Number of tiles that cover `length` pixels."""
    return -(-length // TILE)


def weight_gradient(x: mx.array, dy: mx.array) -> mx.array:
    """Gradient for the transformed weight; `untransform_weight_gradient` gives that for the weight.

    Args:
        x: result of `transform_input`, (36, n, C).
        dy: result of `transform_gradient`, (36, n, O).

    Returns:
        (36, O, C).
    """
    return dy.swapaxes(1, 2) @ x


def transform_gradient(dy: mx.array, count: tuple[int, int]) -> mx.array:
    """Transform an output gradient (B, h, w, O) of at most `count` tiles: (36, n, O)."""
    pixels = im2col(dy, (TILE, TILE), TILE, count, position_first=True)
    return (_matrices()[2].T @ pixels).reshape(_WINDOW * _WINDOW, -1, dy.shape[3])


def untransform_weight_gradient(values: mx.array) -> mx.array:
    """Gradient for the transformed weight, (36, O, C) -> gradient for the weight, (O, 3, 3, C)."""
    _, out, channels = values.shape
    taps = _matrices()[1].T @ values.reshape(_WINDOW * _WINDOW, -1)
    return taps.reshape(3, 3, out, channels).transpose(2, 0, 1, 3)
