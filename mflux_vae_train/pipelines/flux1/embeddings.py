"""What FLUX.1's transformer is told beside the picture: time, guidance, the pooled prompt, and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae.kernels import silu

SINUSOIDAL_CHANNELS = 256
ROPE_THETA = 10_000.0

Rotation = tuple[mx.array, mx.array]
"""Cosine and sine of every position's angles, each (N, 1, head_dim) float32; the sine of a pair's first is negative."""


def sinusoidal(values: mx.array, channels: int = SINUSOIDAL_CHANNELS, max_period: float = 10_000.0) -> mx.array:
    """(B,) -> (B, channels) float32: all cos(v w_i), then all sin(v w_i); w_i = max_period^(-2i/channels)."""
    half = channels // 2
    # In float64 first: 1000 * guidance magnifies an error in a frequency.
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
    """Sum of embedded timestep, guidance (if the model was distilled with it) and pooled prompt: (B, D)."""

    def __init__(self, width: int, pooled: int, guidance_embeds: bool) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayerEmbedder(SINUSOIDAL_CHANNELS, width)
        if guidance_embeds:
            self.guidance_embedder = TwoLayerEmbedder(SINUSOIDAL_CHANNELS, width)
        self.text_embedder = TwoLayerEmbedder(pooled, width)

    def __call__(self, timestep: mx.array, guidance: mx.array | None, pooled: mx.array) -> mx.array:
        # Sinusoids in float32: 1000 * sigma does not fit bfloat16's eight bits of mantissa.
        embedding = self.timestep_embedder(sinusoidal(timestep).astype(pooled.dtype))
        if guidance is not None:
            embedding = embedding + self.guidance_embedder(sinusoidal(guidance).astype(pooled.dtype))
        return embedding + self.text_embedder(pooled)


def rotation(ids: mx.array, axes_dims: Sequence[int]) -> Rotation:
    """Rotary angles of positions with several axes (Su et al. 2021, one band of channels per axis).

    Args:
        ids: (N, A) position of each token on each axis.
        axes_dims: how many channels of a head each axis takes; even, summing to head_dim.
    """
    positions = ids.astype(mx.float32)
    angles = []
    for axis, dims in enumerate(axes_dims):
        # The frequencies in float64 first: an error there grows with the position.
        frequencies = mx.array((ROPE_THETA ** -(np.arange(0, dims, 2) / dims)).astype(np.float32))
        angles.append(positions[:, axis, None] * frequencies)
    angle = mx.concatenate(angles, axis=-1)[:, None]
    sine = mx.sin(angle)
    return mx.repeat(mx.cos(angle), 2, axis=-1), mx.stack([-sine, sine], axis=-1).flatten(-2)


def rotate(x: mx.array, by: Rotation) -> mx.array:
    """Turn neighbouring channels of (B, N, heads, head_dim), as pairs, by their position's angles; float32 inside."""
    turned = cast(mx.array, _turn_with_vjp(x.astype(mx.float32), *by))
    return turned.astype(x.dtype)


def _turn(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    other_of_pair = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return x * cos + other_of_pair * sin


_turn_with_vjp = mx.custom_function(_turn)


@_turn_with_vjp.vjp
def _turn_back(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    """The gradient of a rotation is the rotation back, cheaper than those of the slices. Angles are not learnt."""
    _, cos, sin = primals
    return _turn(cotangent, cos, -sin), mx.zeros_like(cos), mx.zeros_like(sin)
