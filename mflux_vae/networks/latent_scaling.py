"""Scaling between the raw latents of a network and those of a denoiser."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import ImageError


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
    """Base of networks whose scaled latents are (latents - shift_factor) * scaling_factor.

    With `latents_mean` and `latents_std` per channel they are (latents - mean) * scaling_factor / std.
    """

    config: Any

    def to_scaled(self, latents: mx.array) -> mx.array:
        """Scale raw latents (B, h, w, latent) for a denoiser."""
        if (statistics := self._mean_and_std()) is None:
            return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor
        mean, std = statistics
        return (latents - mean) * (self.config.scaling_factor / std)

    def from_scaled(self, latents: mx.array) -> mx.array:
        """Inverse of `to_scaled`."""
        if (statistics := self._mean_and_std()) is None:
            return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        mean, std = statistics
        return latents * (std / self.config.scaling_factor) + mean

    def _mean_and_std(self) -> tuple[mx.array, mx.array] | None:
        mean, std = (getattr(self.config, name, None) for name in ("latents_mean", "latents_std"))
        return None if mean is None or std is None else (mx.array(mean), mx.array(std))


def patchify(x: mx.array, side: int) -> mx.array:
    """(B, side * h, side * w, C) -> (B, h, w, C * side * side): channels in the order (channel, row, column)."""
    batch, height, width, channels = x.shape
    if height % side or width % side:
        raise ImageError(f"latents of {height} x {width} do not split into patches of {side} x {side}; pad the image")
    x = x.reshape(batch, height // side, side, width // side, side, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, height // side, width // side, channels * side * side)


def unpatchify(x: mx.array, side: int) -> mx.array:
    """Inverse of `patchify`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // side**2, side, side).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, side * height, side * width, channels // side**2)
