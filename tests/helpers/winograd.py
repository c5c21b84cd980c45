"""Emulate the 3x3 convolution of MLX on Metal: Winograd's F(6x6, 3x3), with intermediate results in the array's dtype.

After `winograd_conv_2D_gpu` in mlx/backend/metal/conv.cpp and its kernels in conv.metal, which transform in float32
and store transformed weights, transformed inputs, products and results in the dtype of the arguments.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

TILE, WINDOW = 6, 8
_INPUT = np.array([
    [1, 0, -21 / 4, 0, 21 / 4, 0, -1, 0],
    [0, 1, 1, -17 / 4, -17 / 4, 1, 1, 0],
    [0, -1, 1, 17 / 4, -17 / 4, -1, 1, 0],
    [0, 1 / 2, 1 / 4, -5 / 2, -5 / 4, 2, 1, 0],
    [0, -1 / 2, 1 / 4, 5 / 2, -5 / 4, -2, 1, 0],
    [0, 2, 4, -5 / 2, -5, 1 / 2, 1, 0],
    [0, -2, 4, 5 / 2, -5, -1 / 2, 1, 0],
    [0, -1, 0, 21 / 4, 0, -21 / 4, 0, 1],
])  # fmt: skip
_WEIGHT = np.array([
    [1, 0, 0],
    [-2 / 9, -2 / 9, -2 / 9],
    [-2 / 9, 2 / 9, -2 / 9],
    [1 / 90, 1 / 45, 2 / 45],
    [1 / 90, -1 / 45, 2 / 45],
    [32 / 45, 16 / 45, 8 / 45],
    [32 / 45, -16 / 45, 8 / 45],
    [0, 0, 1],
])  # fmt: skip
_POINTS = np.array([0, 1, -1, 2, -2, 1 / 2, -1 / 2])
_OUTPUT = np.concatenate([[_POINTS**n for n in range(TILE)], np.eye(TILE)[:, -1:]], axis=1)

_native = mx.conv2d


def _both_axes(matrix: np.ndarray, x: mx.array) -> mx.array:
    """Multiply axes 0 and 1 of x by a matrix, in float32."""
    m = mx.array(matrix, mx.float32)
    return mx.tensordot(m, mx.tensordot(m, x.astype(mx.float32), ([1], [0])), ([1], [1])).swapaxes(0, 1)


def conv2d(x: mx.array, weight: mx.array, stride: Any = 1, padding: Any = 0, **others: Any) -> mx.array:
    """Stands for `mx.conv2d`. Metal requires 4096 pixels as well, which tests of this size do not have."""
    out, height, width, channels = weight.shape
    wide = channels % 32 == 0 and out % 32 == 0 and channels + out >= 256
    if (height, width) != (3, 3) or stride not in (1, (1, 1)) or others or not wide:
        return _native(x, weight, stride, padding, **others)
    dtype = mx.result_type(x, weight)
    high, across = (padding, padding) if isinstance(padding, int) else padding
    x = mx.pad(x.astype(dtype), [(0, 0), (high, high), (across, across), (0, 0)])
    rows, columns = x.shape[1] - 2, x.shape[2] - 2
    down, right = -(-rows // TILE), -(-columns // TILE)
    x = mx.pad(x, [(0, 0), (0, TILE * down - rows), (0, TILE * right - columns), (0, 0)])
    # (8, 8, B, down, right, C)
    windows = mx.stack(
        [
            mx.stack([x[:, i : i + TILE * down : TILE, j : j + TILE * right : TILE] for j in range(WINDOW)])
            for i in range(WINDOW)
        ]
    )
    inputs = _both_axes(_INPUT, windows).astype(dtype)
    weights = _both_axes(_WEIGHT, weight.transpose(1, 2, 3, 0)).astype(dtype)
    flat = inputs.reshape(WINDOW**2, -1, channels).astype(mx.float32)
    products = (flat @ weights.reshape(WINDOW**2, channels, out).astype(mx.float32)).astype(dtype)
    y = _both_axes(_OUTPUT, products.reshape(WINDOW, WINDOW, -1, down, right, out)).astype(dtype)
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(-1, TILE * down, TILE * right, out)
    return y[:, :rows, :columns]
