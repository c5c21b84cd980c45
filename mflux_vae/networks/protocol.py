"""Interface of the networks that `VAE` wraps. `tests/contracts/network_contract.py` checks it."""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from mflux_vae.posterior import DiagonalGaussian


class AutoencoderConfig(Protocol):
    """Configuration of an autoencoder, usually a frozen dataclass."""

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of a raw latent."""
        ...

    @property
    def downsampling(self) -> int:
        """Pixels per raw latent in each direction."""
        ...

    @property
    def scaled_channels(self) -> int:
        """Channels of a scaled latent."""
        ...

    @property
    def scaled_downsampling(self) -> int:
        """Pixels per scaled latent in each direction."""
        ...

    @property
    def scaling_factor(self) -> float:
        """Scaled latents are (raw - shift_factor) * scaling_factor, unless statistics scale them."""
        ...

    @property
    def shift_factor(self) -> float | None:
        """See `scaling_factor`; None is 0."""
        ...

    @property
    def vectors(self) -> bool:
        """Whether latents are vectors (B, latent_channels). Such a network takes images of one size, `downsampling`."""
        ...

    @property
    def force_upcast(self) -> bool:
        """Whether activations overflow in float16."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with `_class_name`."""
        ...


class Autoencoder(Protocol):
    """A network (`nn.Module`) that encodes and decodes NHWC images in [-1, 1]."""

    @property
    def config(self) -> AutoencoderConfig: ...

    def encode(self, pixels: mx.array) -> DiagonalGaussian:
        """(B, H, W, C), sides multiples of `downsampling` -> posterior over raw latents (B, h, w, latent)."""
        ...

    def decode(self, latents: mx.array) -> mx.array:
        """Raw latents -> (B, H, W, C), about [-1, 1], not clipped."""
        ...

    def to_scaled(self, latents: mx.array) -> mx.array:
        """Raw latents -> scaled latents."""
        ...

    def from_scaled(self, latents: mx.array) -> mx.array:
        """Inverse of `to_scaled`."""
        ...


def missing_members(network: object) -> list[str]:
    """Members of `Autoencoder` and of its configuration that a network lacks."""
    missing = [name for name in _members(Autoencoder) if not hasattr(network, name)]
    config = getattr(network, "config", None)
    return missing + [f"config.{name}" for name in _members(AutoencoderConfig) if not hasattr(config, name)]


def _members(protocol: type) -> list[str]:
    return [name for name in vars(protocol) if not name.startswith("_")]
