"""Build the autoencoder and the discriminator from settings; set training mode; inspect networks."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError
from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mflux_vae.networks.layers import Conv2d
from mflux_vae.networks.plain import PlainAutoencoder, PlainConfig
from mflux_vae.networks.vector_latent import FlatAutoencoder, FlatConfig
from mflux_vae.pretrained import loading
from mflux_vae.runtime.device import eval_each
from mflux_vae.runtime.threads import exclusive
from mflux_vae_train.randomness import Stream, rng
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.losses.adversarial import PatchDiscriminator
from mflux_vae_train.vae.network import init_weights

_NORM_GROUPS = 32
"""Groups of group normalization; fewer if the widths are not divisible by it."""

MIN_DISCRIMINATOR_SIZE = 24
"""Smallest image side (pixels) for which a discriminator with three strided layers has an output."""


def build(settings: VAETrainingSettings) -> Any:
    """Build or open the autoencoder to train. New weights are a function of the seed.

    Raises:
        SettingsError: widths, channels and image size do not match.
        WeightsError: `init_from` or `network_config` cannot be read.
    """
    if settings.train == "decoder" and settings.init_from is None:
        raise SettingsError("--train decoder: there is no trained encoder; give --init_from")
    _seed(settings.seed)
    network: Any = _network(settings)
    if settings.init == "orthogonal":
        init_weights.orthogonal(network, settings.seed)
    with exclusive():
        eval_each(network.parameters())
    config = network.config
    if config.in_channels != settings.in_channels or config.out_channels != settings.in_channels:
        raise SettingsError(f"--in_channels is {settings.in_channels}; the network has {config.in_channels}")
    if not has_vector_latents(network) and settings.image_size % config.downsampling:
        raise SettingsError(f"--image_size is {settings.image_size}; a multiple of {config.downsampling} is allowed")
    if has_vector_latents(network) and config.image_size != settings.image_size:
        raise SettingsError(f"--image_size is {settings.image_size}; the network has {config.image_size}")
    return network


def _network(settings: VAETrainingSettings) -> nn.Module:
    if settings.init_from is not None:
        return loading.open_network(settings.init_from, mx.float32)
    if settings.network_config is not None:
        return loading.new_network(settings.network_config)
    channels, widths = settings.in_channels, settings.widths
    common: dict[str, Any] = {"in_channels": channels, "out_channels": channels}
    if settings.network == "plain":
        return PlainAutoencoder(PlainConfig(**common, latent_channels=settings.latent_dim, channels=widths))
    if settings.network == "kl":
        config = AutoencoderKLConfig(
            **common,
            latent_channels=settings.latent_dim,
            block_out_channels=widths,
            layers_per_block=settings.layers_per_block,
            norm_num_groups=int(np.gcd.reduce([_NORM_GROUPS, *widths])),
            scaling_factor=1.0,
            sample_size=settings.image_size,
            force_upcast=False,
        )
        return AutoencoderKL(config)
    names = ("latent_dim", "image_size", "batch_norm", "upsampling", "last_conv", "output")
    return FlatAutoencoder(
        FlatConfig(**common, hidden_dims=widths, **{name: getattr(settings, name) for name in names})
    )


def build_discriminator(settings: VAETrainingSettings, network: Any) -> PatchDiscriminator:
    """Build the discriminator. Its weights are a function of the seed.

    Raises:
        SettingsError: the latents are vectors, or the images are too small.
    """
    if has_vector_latents(network):
        raise SettingsError("--disc_start: the network has vector latents; use --network kl or plain")
    if settings.image_size < MIN_DISCRIMINATOR_SIZE:
        raise SettingsError(f"--disc_start: images are too small; use --image_size {MIN_DISCRIMINATOR_SIZE} or more")
    _seed(settings.seed, 1)
    discriminator = PatchDiscriminator(settings.in_channels)
    mx.eval(discriminator.parameters())
    return discriminator


def set_training_mode(network: Any, part: str = "all") -> None:
    """Set training mode. `part` "decoder" freezes the encoder, including its batch statistics."""
    network.train()
    if part == "decoder":
        network.freeze()
        for name in {"decoder", "post_quant_conv"} & network.keys():
            network[name].unfreeze()
        network.encoder.eval()


def has_vector_latents(network: Any) -> bool:
    """Whether the latents are vectors, not spatial."""
    return isinstance(network, FlatAutoencoder)


def latent_shape(network: Any, image_size: int) -> tuple[int, ...]:
    """Shape of one latent: (D,), or (h, w, C) for square images of `image_size` pixels."""
    config = network.config
    if has_vector_latents(network):
        return (config.latent_dim,)
    side = image_size // config.downsampling
    return (side, side, config.latent_channels)


def parameter_count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(value.size for value in dict(tree_flatten(network.trainable_parameters())).values())


def _seed(*path: int) -> None:
    """Seed MLX's global state, from which networks draw their weights."""
    mx.random.seed(int(rng(path[0], Stream.INIT, *path[1:]).integers(2**63)))


def penultimate_features(network: Any, latents: mx.array) -> mx.array:
    """Input of the decoder's last convolution (B, H, W, C), computed with an identity in its place."""
    decoder = network.decoder
    last, width = decoder.conv_out, decoder.conv_out.weight.shape[-1]
    decoder.conv_out = Conv2d(width, width, 1, bias=False)
    decoder.conv_out.weight = mx.eye(width, dtype=last.weight.dtype).reshape(width, 1, 1, width)
    try:
        return network.decode(latents)
    finally:
        decoder.conv_out = last
