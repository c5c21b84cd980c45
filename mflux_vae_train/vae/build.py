"""The network that settings describe, new or opened, and what training does to it beside changing its weights."""

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
from mflux_vae_train.randomness import Stream, rng
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.losses.adversarial import PatchDiscriminator
from mflux_vae_train.vae.network import init_weights

_GROUPS = 32
"""Of group norms, where the widths allow it."""

_CRITIC_SEES = 24
"""Pixels in each direction from which a discriminator of three strided layers has a patch."""


def build(settings: VAETrainingSettings) -> Any:
    """The autoencoder to train, its weights a function of the seed.

    Raises:
        SettingsError: widths, channels or image size do not go together.
        WeightsError: there is nothing to open.
    """
    if settings.train == "decoder" and settings.init_from is None:
        raise SettingsError("--train decoder needs an encoder that was trained: --init_from")
    _seed(settings.seed)
    network: Any = _network(settings)
    if settings.init == "orthogonal":
        init_weights.orthogonal(network, settings.seed)
    eval_each(network.parameters())
    config = network.config
    if config.in_channels != settings.in_channels or config.out_channels != settings.in_channels:
        raise SettingsError(f"--in_channels is {settings.in_channels}; the network has {config.in_channels}")
    if not is_flat(network) and settings.image_size % config.downsampling:
        raise SettingsError(f"--image_size is {settings.image_size}; a multiple of {config.downsampling} is allowed")
    if is_flat(network) and config.image_size != settings.image_size:
        raise SettingsError(f"--image_size is {settings.image_size}; the network's is {config.image_size}")
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
            norm_num_groups=int(np.gcd.reduce([_GROUPS, *widths])),
            scaling_factor=1.0,
            sample_size=settings.image_size,
            force_upcast=False,
        )
        return AutoencoderKL(config)
    names = ("latent_dim", "image_size", "batch_norm", "upsampling", "last_conv", "output")
    return FlatAutoencoder(
        FlatConfig(**common, hidden_dims=widths, **{name: getattr(settings, name) for name in names})
    )


def new_critic(settings: VAETrainingSettings, network: Any) -> PatchDiscriminator:
    """The discriminator, its weights a function of the seed.

    Raises:
        SettingsError: latents are vectors, or images smaller than what it looks at.
    """
    if is_flat(network):
        raise SettingsError("--disc_start: a discriminator is for networks with spatial latents, kl and plain")
    if settings.image_size < _CRITIC_SEES:
        raise SettingsError(f"--disc_start: a discriminator needs images of {_CRITIC_SEES} pixels or more")
    _seed(settings.seed, 1)
    critic = PatchDiscriminator(settings.in_channels)
    mx.eval(critic.parameters())
    return critic


def begin_training(network: Any, part: str = "all") -> None:
    """Puts it into training, all of it or `part` "decoder": then the encoder stays as it is, statistics included."""
    network.train()
    if part == "decoder":
        network.freeze()
        decoding = [network[name] for name in ("decoder", "post_quant_conv") if name in network]
        for half in decoding:
            half.unfreeze()
        network.encoder.eval()


def is_flat(network: Any) -> bool:
    """Whether its latents are vectors."""
    return isinstance(network, FlatAutoencoder)


def latent_shape(network: Any, image_size: int) -> tuple[int, ...]:
    """Of one latent: (D,), or (h, w, C) for images of that size."""
    config = network.config
    if is_flat(network):
        return (config.latent_dim,)
    side = image_size // config.downsampling
    return (side, side, config.latent_channels)


def parameter_count(network: nn.Module) -> int:
    """Trainable numbers."""
    return sum(value.size for value in dict(tree_flatten(network.trainable_parameters())).values())


def _seed(*path: int) -> None:
    """Networks draw their weights from MLX's global state."""
    mx.random.seed(int(rng(path[0], Stream.INIT, *path[1:]).integers(2**63)))


def before_last_layer(network: Any, latents: mx.array) -> mx.array:
    """What the decoder's last convolution would get, computed by putting the identity in its place. (B, H, W, C)."""
    decoder = network.decoder
    last, width = decoder.conv_out, decoder.conv_out.weight.shape[-1]
    decoder.conv_out = Conv2d(width, width, 1, bias=False)
    decoder.conv_out.weight = mx.eye(width, dtype=last.weight.dtype).reshape(width, 1, 1, width)
    try:
        return network.decode(latents)
    finally:
        decoder.conv_out = last
