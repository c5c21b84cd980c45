"""Small autoencoders with weights that are nowhere zero or one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae import AutoencoderKL, AutoencoderKLConfig, PlainAutoencoder, PlainConfig
from mflux_vae.networks.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from mflux_vae.networks.tiny import AutoencoderTiny, AutoencoderTinyConfig
from mflux_vae.networks.video.taehv import TAEHV, TAEHVConfig
from mflux_vae.networks.video.wan import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImageConfig,
    AutoencoderKLWan,
    AutoencoderKLWanConfig,
)
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.pretrained.presets import Preset


def drawn(network: nn.Module, seed: int = 0) -> nn.Module:
    """The same network with reproducible random weights, of a size that keeps the signal's."""
    flat = tree_flatten(network.parameters())
    keys = mx.random.split(mx.random.key(seed), len(flat))
    new = []
    for (name, old), key in zip(sorted(flat), keys, strict=True):
        if not mx.issubdtype(old.dtype, mx.floating):
            continue
        if name.endswith("running_var"):
            new.append((name, mx.random.uniform(0.2, 3, old.shape, key=key)))
            continue
        spread = (old.size // old.shape[0]) ** -0.5 if old.ndim > 1 else 0.2
        offset = 1.0 if "norm" in name and name.endswith(("weight", "gamma")) else 0.0
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


def small_flux2(seed: int = 0, **changes: Any) -> AutoencoderKLFlux2:
    """8x downsampling, 3 latent channels, 12 where scaled at 16x, a narrower decoder."""
    settings = {"block_out_channels": (8, 8, 16, 16), "decoder_block_out_channels": (4, 4, 8, 8), "latent_channels": 3}
    settings |= {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
    network = AutoencoderKLFlux2(AutoencoderKLFlux2Config(**{**settings, **changes}))
    drawn(network, seed)
    return network


def small_tiny(seed: int = 0, **changes: Any) -> AutoencoderTiny:
    """8x downsampling, 4 latent channels, ReLU."""
    settings = {f"{half}_block_out_channels": (8, 8, 8, 8) for half in ("encoder", "decoder")}
    settings |= {"num_encoder_blocks": (1, 1, 0, 1), "num_decoder_blocks": (1, 0, 1, 1)}
    network = AutoencoderTiny(AutoencoderTinyConfig(**{**settings, **changes}))
    drawn(network, seed)
    return network


def small_taehv(seed: int = 0, **changes: Any) -> TAEHV:
    """8x downsampling, 16 latent channels, ReLU, memory of a frame before."""
    network = TAEHV(TAEHVConfig(**{"encoder_width": 8, "decoder_widths": (16, 8, 8, 4), **changes}))
    drawn(network, seed)
    return network


WAN: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "latents_mean": (-0.5, 0.1, 0.0, 1.5), "latents_std": (2, 0.5, 1, 3)}
"""A twelfth of the published channels, 4 latent channels."""


def small_wan(seed: int = 0, **changes: Any) -> AutoencoderKLWan:
    """8x downsampling, a wider decoder, normalisation per pixel."""
    network = AutoencoderKLWan(AutoencoderKLWanConfig(**{**WAN, "decoder_base_dim": 12, **changes}))
    drawn(network, seed)
    return network


def small_qwen_image(seed: int = 0, **changes: Any) -> AutoencoderKLQwenImage:
    """8x downsampling, normalisation per pixel."""
    network = AutoencoderKLQwenImage(AutoencoderKLQwenImageConfig(**{**WAN, "num_res_blocks": 1, **changes}))
    drawn(network, seed)
    return network


def narrow(preset: Preset, seed: int = 0) -> Any:
    """The network of a preset with a sixteenth of its channels (TAESD's: an eighth), weights drawn."""
    config, family = preset.config, FAMILIES[preset.family]
    if preset.family == "AutoencoderTiny":
        widths = [(8,) * len(config.num_encoder_blocks)] * 2
        config = replace(config, encoder_block_out_channels=widths[0], decoder_block_out_channels=widths[1])
    else:
        changes: dict[str, Any] = {"norm_num_groups": 2, "sample_size": 32}
        for name in ("block_out_channels", "decoder_block_out_channels"):
            if widths := getattr(config, name):
                changes[name] = tuple(width // 16 for width in widths)
        config = replace(config, **changes)
    return drawn(family.network(config), seed)


def pictures(batch: int = 2, height: int = 24, width: int = 32, seed: int = 0) -> mx.array:
    """(B, 3, H, W) uint8."""
    return mx.random.randint(0, 256, (batch, 3, height, width), key=mx.random.key(seed)).astype(mx.uint8)
