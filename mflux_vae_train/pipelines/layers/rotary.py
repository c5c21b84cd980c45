"""Rotary position embedding with several axes."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

ROPE_THETA = 10_000.0

Rotation = tuple[mx.array, mx.array]
"""Cosine and sine of each position's angles, (N, 1, head_dim) or (B, N, 1, head_dim) float32; the first sine of a pair
is negated."""


def rotation(ids: mx.array, axes_dims: Sequence[int], theta: float = ROPE_THETA, *, halves: bool = False) -> Rotation:
    """Rotary angles of positions with several axes (Su et al. 2021, one band of channels per axis).

    Args:
        ids: (N, A), or (B, N, A) if they differ between rows: position of each token on each axis.
        axes_dims: channels of a head per axis; even numbers whose sum is head_dim.
        theta: base of the frequencies.
        halves: see `kernels.rotate`.
    """
    positions = ids.astype(mx.float32)
    angles = []
    for axis, dims in enumerate(axes_dims):
        # float64 first: positions magnify errors of the frequencies
        frequencies = mx.array((theta ** -(np.arange(0, dims, 2) / dims)).astype(np.float32))
        angles.append(positions[..., axis, None] * frequencies)
    angle = mx.concatenate(angles, axis=-1)[..., None, :]
    sine = mx.sin(angle)
    if halves:
        return mx.concatenate([mx.cos(angle)] * 2, axis=-1), mx.concatenate([-sine, sine], axis=-1)
    return mx.repeat(mx.cos(angle), 2, axis=-1), mx.stack([-sine, sine], axis=-1).flatten(-2)
