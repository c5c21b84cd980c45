"""Embeddings of FLUX.1's transformer: timestep, guidance and pooled prompt; rotary positions of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae.kernels import silu
from mflux_vae.runtime.device import is_cpu

SINUSOIDAL_CHANNELS = 256
ROPE_THETA = 10_000.0

Rotation = tuple[mx.array, mx.array]
"""Cosine and sine of each position's angles, (N, 1, head_dim) float32; the first sine of a pair is negated."""


def sinusoidal(values: mx.array, channels: int = SINUSOIDAL_CHANNELS, max_period: float = 10_000.0) -> mx.array:
    """(B,) -> (B, channels) float32: all cos(v w_i), then all sin(v w_i); w_i = max_period^(-2i/channels)."""
    half = channels // 2
    # float64 first: 1000 * guidance magnifies errors of the frequencies
    frequencies = (max_period ** -(np.arange(half) / half)).astype(np.float32)
    angles = values.astype(mx.float32)[:, None] * mx.array(frequencies)
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


class TwoLayerEmbedder(nn.Module):
    """linear_1, SiLU, linear_2: (B, inputs) -> (B, width)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(silu(self.linear_1(x)))


class TimeTextEmbedding(nn.Module):
    """Sum of embedded timestep, guidance (if the model has it) and pooled prompt: (B, D)."""

    def __init__(self, width: int, pooled: int, guidance_embeds: bool) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayerEmbedder(SINUSOIDAL_CHANNELS, width)
        if guidance_embeds:
            self.guidance_embedder = TwoLayerEmbedder(SINUSOIDAL_CHANNELS, width)
        self.text_embedder = TwoLayerEmbedder(pooled, width)

    def __call__(self, timestep: mx.array, guidance: mx.array | None, pooled: mx.array) -> mx.array:
        # sinusoids in float32: bfloat16 cannot represent 1000 * sigma
        embedding = self.timestep_embedder(sinusoidal(timestep).astype(pooled.dtype))
        if guidance is not None:
            embedding = embedding + self.guidance_embedder(sinusoidal(guidance).astype(pooled.dtype))
        return embedding + self.text_embedder(pooled)


def rotation(ids: mx.array, axes_dims: Sequence[int]) -> Rotation:
    """Rotary angles of positions with several axes (Su et al. 2021, one band of channels per axis).

    Args:
        ids: (N, A) position of each token on each axis.
        axes_dims: channels of a head per axis; even numbers whose sum is head_dim.
    """
    positions = ids.astype(mx.float32)
    angles = []
    for axis, dims in enumerate(axes_dims):
        # float64 first: positions magnify errors of the frequencies
        frequencies = mx.array((ROPE_THETA ** -(np.arange(0, dims, 2) / dims)).astype(np.float32))
        angles.append(positions[:, axis, None] * frequencies)
    angle = mx.concatenate(angles, axis=-1)[:, None]
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
