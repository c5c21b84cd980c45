"""Small autoencoders with weights that are nowhere zero or one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae import AutoencoderKL, AutoencoderKLConfig, PlainAutoencoder, PlainConfig


def drawn(network: nn.Module, seed: int = 0) -> nn.Module:
    """The same network with reproducible random weights, of a size that keeps the signal's."""
    flat = tree_flatten(network.parameters())
    keys = mx.random.split(mx.random.key(seed), len(flat))
    new = []
    for (name, old), key in zip(sorted(flat), keys, strict=True):
        spread = (old.size // old.shape[0]) ** -0.5 if old.ndim > 1 else 0.2
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        new.append((name, offset + spread * mx.random.normal(old.shape, key=key)))
    network.update(tree_unflatten(new))
    return network


def small_kl(seed: int = 0, **changes: Any) -> AutoencoderKL:
    """8x downsampling, 4 latent channels, attention, quant convolutions: some 60,000 parameters."""
    settings = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
    network = AutoencoderKL(AutoencoderKLConfig(**{**settings, **changes}))
    drawn(network, seed)
    return network


def small_plain(seed: int = 0, **changes: Any) -> PlainAutoencoder:
    """8x downsampling, 4 latent channels, LeakyReLU."""
    network = PlainAutoencoder(PlainConfig(**{"channels": (4, 6, 8, 8), "bottleneck_blocks": 1, **changes}))
    drawn(network, seed)
    return network


def pictures(batch: int = 2, height: int = 24, width: int = 32, seed: int = 0) -> mx.array:
    """(B, 3, H, W) uint8."""
    return mx.random.randint(0, 256, (batch, 3, height, width), key=mx.random.key(seed)).astype(mx.uint8)
