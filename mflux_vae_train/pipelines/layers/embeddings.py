"""Embeddings of numbers, such as timesteps."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae.kernels import silu
from mflux_vae.networks.layers import Linear

SINUSOIDAL_CHANNELS = 256


def sinusoidal(values: mx.array, channels: int = SINUSOIDAL_CHANNELS, max_period: float = 10_000.0) -> mx.array:
    """(B,) -> (B, channels) float32: all cos(v w_i), then all sin(v w_i); w_i = max_period^(-2i/channels)."""
    half = channels // 2
    # float64 first: 1000 * guidance magnifies errors of the frequencies
    frequencies = (max_period ** -(np.arange(half) / half)).astype(np.float32)
    angles = values.astype(mx.float32)[:, None] * mx.array(frequencies)
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


class TwoLayerEmbedder(nn.Module):
    """linear_1, SiLU, linear_2: (B, inputs) -> (B, width)."""

    def __init__(self, inputs: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, width, bias=bias)
        self.linear_2 = Linear(width, width, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(silu(self.linear_1(x)))
