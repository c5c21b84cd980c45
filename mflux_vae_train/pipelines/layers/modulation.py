"""Normalization of diffusion transformers: modulated by conditioning, and of queries and keys."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.networks.layers import Linear

NORM_EPS = 1e-6


class Modulation(nn.Module):
    """Shift, scale and gate of a block (adaLN-Zero, Peebles & Xie 2023): activated conditioning (B, D) -> `parts`
    arrays (B, 1, D).
    """

    def __init__(self, width: int, parts: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = Linear(width, parts * width, bias=bias)
        self._parts = parts

    def __call__(self, conditioning: mx.array) -> list[mx.array]:
        return list(mx.split(self.linear(conditioning)[:, None], self._parts, axis=-1))


def modulated_norm(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """Layer norm without weights, then scale and shift by (B, 1, D)."""
    return kernels.modulated_norm(x, shift, scale, NORM_EPS)


class HeadNorm(nn.Module):
    """RMS norm over the channels of a head."""

    def __init__(self, head_dim: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.weight = mx.ones(head_dim)
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.rms_norm(x, self.weight, self.eps)
