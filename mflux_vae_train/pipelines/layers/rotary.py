"""Rotary position embedding with several axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import numpy as np

from mflux_vae.runtime.device import is_cpu

ROPE_THETA = 10_000.0

Rotation = tuple[mx.array, mx.array]
"""Cosine and sine of each position's angles, (N, 1, head_dim) or (B, N, 1, head_dim) float32; the first sine of a pair
is negated."""


def rotation(ids: mx.array, axes_dims: Sequence[int], theta: float = ROPE_THETA) -> Rotation:
    """Rotary angles of positions with several axes (Su et al. 2021, one band of channels per axis).

    Args:
        ids: (N, A), or (B, N, A) if they differ between rows: position of each token on each axis.
        axes_dims: channels of a head per axis; even numbers whose sum is head_dim.
        theta: base of the frequencies.
    """
    positions = ids.astype(mx.float32)
    angles = []
    for axis, dims in enumerate(axes_dims):
        # float64 first: positions magnify errors of the frequencies
        frequencies = mx.array((theta ** -(np.arange(0, dims, 2) / dims)).astype(np.float32))
        angles.append(positions[..., axis, None] * frequencies)
    angle = mx.concatenate(angles, axis=-1)[..., None, :]
    sine = mx.sin(angle)
    return mx.repeat(mx.cos(angle), 2, axis=-1), mx.stack([-sine, sine], axis=-1).flatten(-2)


def rotate(x: mx.array, angles: Rotation) -> mx.array:
    """Rotate pairs of neighbouring channels of (B, N, heads, head_dim) by their position's angles, in float32."""
    return cast(mx.array, _rotate_with_vjp(x, *angles))


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return (_rotate_pairs if is_cpu() else _rotate_pairs_compiled)(x, cos, sin)


def _rotate_pairs(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    other_of_pair = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return (x.astype(mx.float32) * cos + other_of_pair.astype(mx.float32) * sin).astype(x.dtype)


_rotate_pairs_compiled = mx.compile(_rotate_pairs)
_rotate_with_vjp = mx.custom_function(_rotate)


@_rotate_with_vjp.vjp
def _rotate_back(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    """The inverse rotation, which is cheaper than the gradients of the slices. Angles are constants."""
    _, cos, sin = primals
    return _rotate(cotangent, cos, -sin), mx.zeros_like(cos), mx.zeros_like(sin)
