"""What autoencoders share: the way from their own latents, the raw ones, to those that a denoiser sees, and back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class ScaledConfig:
    """Of configurations whose scaled latents have the shape of the raw ones."""

    @property
    def scaled_channels(self: Any) -> int:
        """Channels of a scaled latent."""
        return self.latent_channels

    @property
    def scaled_downsampling(self: Any) -> int:
        """Pixels per scaled latent in each direction."""
        return self.downsampling


class ScaledLatents(nn.Module):
    """Of networks whose scaled latents are (latents - shift_factor) * scaling_factor."""

    config: Any

    def to_scaled(self, latents: mx.array) -> mx.array:
        """Raw latents (B, h, w, latent) -> what a denoiser sees."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def from_scaled(self, latents: mx.array) -> mx.array:
        """The inverse of `to_scaled`."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
