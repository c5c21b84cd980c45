"""Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016): a 3x3 convolution for a quarter of the products.

Tiles of 6x6 pixels, four apart, give 4x4 results: y = A' [(G w G') * (B' x B)] A, the product being one of C by O
matrices at each of the 36 places. Both transforms of a tile are linear in its 36 pixels: one 36x36 and one 16x36
matrix, so that all three steps are matrix products, which is what a BLAS does best. The relative error is 1e-5.
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
    """The transforms of pixels (36, 36), weights (36, 9) and results (16, 36)."""
    pixels, weights, results = (mx.array(np.kron(m, m).astype(np.float32)) for m in map(np.array, (_B, _G, _A)))
    mx.eval(pixels, weights, results)
    return pixels, weights, results


def transform_weight(weight: mx.array, *, flip: bool = False) -> mx.array:
    """(O, 3, 3, C) -> (36, O, C): the weights at each of the 36 places; turned (36, C, O), of `flipped`'s."""
    out, _, _, channels = weight.shape
    transform = _matrices()[1][:, ::-1] if flip else _matrices()[1]
    places = (transform @ weight.transpose(1, 2, 0, 3).reshape(9, -1)).reshape(-1, out, channels)
    return places.swapaxes(1, 2) if flip else places


def transform_input(x: mx.array, count: tuple[int, int], origin: tuple[int, int] = (0, 0)) -> mx.array:
    """An image's tiles, transformed.

    Args:
        x: (B, H, W, C).
        count: of tiles, down (h) and across (w).
        origin: zeros above and to the left of the image; there are as many below and to the right as it takes.

    Returns:
        (36, B h w, C).
    """
    pixels = im2col(x, (_WINDOW, _WINDOW), TILE, count, origin, position_first=True)
    return (_matrices()[0] @ pixels).reshape(_WINDOW * _WINDOW, -1, x.shape[3])


def convolve(x: mx.array, weight: mx.array, count: tuple[int, int]) -> mx.array:
    """Convolution of `tiles`, (36, B h w, C), with a `transformed` weight, (36, O, C).

    Args:
        count: of tiles, h and w.

    Returns:
        (B, h, 4, w, 4, O), a view; (B, 4 h, 4 w, O) once it is copied.
    """
    products = x @ weight.swapaxes(1, 2)
    y = _matrices()[2] @ products.reshape(_WINDOW * _WINDOW, -1)
    return y.reshape(TILE, TILE, -1, *count, weight.shape[1]).transpose(2, 3, 0, 4, 1, 5)


def join_tiles(y: mx.array) -> mx.array:
    """Tiles (B, h, 4, w, 4, O) -> (B, 4 h, 4 w, O)."""
    batch, down, tall, across, wide, out = y.shape
    return y.reshape(batch, down * tall, across * wide, out)


def tile_count(length: int) -> int:
    """How many tiles cover a length."""
    return -(-length // TILE)


def weight_gradient(x: mx.array, dy: mx.array) -> mx.array:
    """Gradient for the weight of a convolution, before `weight_from_places`: that for its `transformed` one.

    Args:
        x: `tiles`, (36, n, C).
        dy: `result_tiles`, (36, n, O).

    Returns:
        (36, O, C).
    """
    return dy.swapaxes(1, 2) @ x


def transform_gradient(dy: mx.array, count: tuple[int, int]) -> mx.array:
    """A gradient for the result, (B, h, w, O) of at most `count` tiles, at the 36 places: (36, n, O)."""
    pixels = im2col(dy, (TILE, TILE), TILE, count, position_first=True)
    return (_matrices()[2].T @ pixels).reshape(_WINDOW * _WINDOW, -1, dy.shape[3])


def untransform_weight_gradient(places: mx.array) -> mx.array:
    """Gradient for the `transformed` weight, (36, O, C) -> for the weight, (O, 3, 3, C)."""
    _, out, channels = places.shape
    taps = _matrices()[1].T @ places.reshape(_WINDOW * _WINDOW, -1)
    return taps.reshape(3, 3, out, channels).transpose(2, 0, 1, 3)
