"""Estimates of Stable Diffusion's memory, from its configurations alone."""

from __future__ import annotations

from collections.abc import Collection

import mlx.nn as nn

from mflux_vae.pretrained.loading import new_network
from mflux_vae.runtime import device
from mflux_vae_train.pipelines.footprint import Phase, Workload
from mflux_vae_train.pipelines.quantization import stored_bytes
from mflux_vae_train.pipelines.stable_diffusion.configs import VAE_FACTOR, Configs
from mflux_vae_train.pipelines.stable_diffusion.files.parts import (
    is_quantized_layer,
    is_quantized_text_layer,
    new_text_encoder,
)
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet

KEPT, KEPT_CHECKPOINTED = 160.0, 30.0
"""Activations kept for the backward pass, in numbers per latent position and channel of the first level."""


def phases(configs: Configs, work: Workload) -> list[Phase]:
    """The phases of a run in order."""
    width = device.compute_dtype().size
    unet = stored_bytes(UNet(configs.unet), width, work.quantize, is_quantized_layer)
    encoders = sum(
        stored_bytes(new_text_encoder(config), width, work.quantize if number else None, is_quantized_text_layer)
        for number, config in enumerate(configs.text_encoders.values())
    )
    autoencoder = stored_bytes(new_network(dict(configs.vae)), 4)
    height, wide = (side // VAE_FACTOR for side in work.trained_shape)
    numbers = configs.unet.block_out_channels[0] * height * wide * work.batch * work.concurrent_micro_batches
    kept = int(numbers * width * (KEPT_CHECKPOINTED if work.gradient_checkpointing else KEPT))
    learning = int(work.trained * (12 + work.state_bytes))
    trained = unet + (encoders if work.text_encoder else 0) + learning
    return [
        Phase("text encoding", encoders, encoders // 4, 0.0),
        Phase("latents", autoencoder, 64 * height * wide * VAE_FACTOR**2, 0.0),
        Phase("training", trained, kept, 0.0),
    ]


def published_bytes(configs: Configs, parts: Collection[str]) -> int:
    """Bytes of some parts as they are published, in half precision."""
    networks: dict[str, nn.Module] = {
        "unet": UNet(configs.unet),
        "vae": new_network(dict(configs.vae)),
        **{name: new_text_encoder(config) for name, config in configs.text_encoders.items()},
    }
    return sum(stored_bytes(networks[part], 2) for part in parts)
