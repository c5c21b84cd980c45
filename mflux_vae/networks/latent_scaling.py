"""Scaling between the raw latents of a network and those of a denoiser."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn


class ScaledConfig:
    """Mixin for configurations whose scaled latents have the shape of the raw ones."""

    vectors: ClassVar[bool] = False

    @property
    def scaled_channels(self: Any) -> int:
        """Channels of a scaled latent."""
        return self.latent_channels

    @property
    def scaled_downsampling(self: Any) -> int:
        """Pixels per scaled latent in each direction."""
        return self.downsampling


class ScaledLatents(nn.Module):
    """Base of networks whose scaled latents are (latents - shift_factor) * scaling_factor."""

    config: Any

    def to_scaled(self, latents: mx.array) -> mx.array:
        """Scale raw latents (B, h, w, latent) for a denoiser."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def from_scaled(self, latents: mx.array) -> mx.array:
        """Inverse of `to_scaled`."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
