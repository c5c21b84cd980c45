"""Rotary position embedding (Su et al. 2021), of queries and keys after their norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from mflux_vae.kernels.cpu.extension import native
from mflux_vae.kernels.normalization import rms_norm
from mflux_vae.runtime.device import is_cpu


def norm_rotary(
    parts: Sequence[mx.array],
    weights: Sequence[mx.array],
    angles: tuple[mx.array, mx.array],
    eps: float,
    *,
    halves: bool = False,
) -> mx.array:
    """RMS norm of each head, then `rotate`; parts follow each other along the positions.

    Args:
        parts: (B, N_i, heads, head_dim) each.
        weights: (head_dim,) for each part.
        angles: of all N positions; constants.

    Returns:
        (B, N, heads, head_dim).
    """
    if (cpu := native()) is not None:
        y: mx.array = cpu.norm_rotary(list(parts), list(weights), *angles, eps, halves).astype(parts[0].dtype)
        return y
    normed = [rms_norm(x, weight, eps) for x, weight in zip(parts, weights, strict=True)]
    return rotate(normed[0] if len(normed) == 1 else mx.concatenate(normed, axis=1), angles, halves=halves)


def rotate(x: mx.array, angles: tuple[mx.array, mx.array], *, halves: bool = False) -> mx.array:
    """Rotate pairs of channels of (B, N, heads, head_dim) by their position's angles, in float32.

    Args:
        angles: cosine and sine, (N, 1, head_dim) or (B, N, 1, head_dim) float32; the first sine of a pair is negated.
        halves: pairs are (i, i + head_dim / 2), else neighbouring channels.
    """
    run = _rotate_halves if halves else _rotate_with_vjp
    return cast(mx.array, run(x, *angles))


def _rotate_halves(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    turned = mx.roll(wide, x.shape[-1] // 2, axis=-1)  # type: ignore[call-arg]  # which MLX's stubs do not know
    return (wide * cos + turned * sin).astype(x.dtype)


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
