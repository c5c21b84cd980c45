"""A VAE with the interface of mflux's VAE, to replace `flux.vae`. mflux need not be installed.

mflux (0.24) calls `encode` and `decode` with NCHW in [-1, 1], with or without a time axis of length 1 after the
channels, and expects results with that axis. It clips images and checks no types.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import ImageError
from mflux_vae.runtime.threads import thread_safe
from mflux_vae.tiling.plan import TilingOption
from mflux_vae.utils.arrays import FILES, LATENTS, as_array


class Autoencoder(Protocol):
    """The members of `mflux_vae.VAE` that the adapter uses."""

    @property
    def latent_channels(self) -> int: ...
    @property
    def spatial_scale(self) -> int: ...
    @property
    def scaling_factor(self) -> float: ...
    @property
    def shift_factor(self) -> float: ...
    def encode_nhwc(self, pixels: mx.array, *, tiling: TilingOption = None) -> mx.array: ...
    def decode_nhwc(self, latents: mx.array, *, tiling: TilingOption = None) -> mx.array: ...


class MfluxVAE(nn.Module):
    """Replacement for `flux.vae`: `flux.vae = vae.as_mflux()`.

    Parameters keep the names of the VAE, so mflux can save them but not load them again.

    Attributes:
        vae: the VAE that encodes and decodes.
        tiling: see `VAE`.
        latent_channels, spatial_scale, scaling_factor, shift_factor: those of the VAE.
        decode_mode: makes mflux skip its tiling, whose tiles differ in tone because each has separate norm statistics.
            The VAE tiles large latents instead.
    """

    decode_mode = "own"

    def __init__(self, vae: Autoencoder, tiling: TilingOption = None):
        super().__init__()
        self.vae, self.tiling = vae, tiling
        self.latent_channels = vae.latent_channels
        self.spatial_scale = vae.spatial_scale
        self.scaling_factor = vae.scaling_factor
        self.shift_factor = vae.shift_factor

    @thread_safe
    def encode(self, image: mx.array) -> mx.array:
        """(B, C, H, W) or (B, C, 1, H, W) in [-1, 1] -> scaled latents (B, latent_channels, 1, h, w), the mode."""
        pixels = _without_time(image, FILES).transpose(0, 2, 3, 1)
        return self.vae.encode_nhwc(pixels, tiling=self.tiling).transpose(0, 3, 1, 2)[:, :, None]

    @thread_safe
    def decode(self, latents: mx.array) -> mx.array:
        """Scaled latents (B, C, h, w) or (B, C, 1, h, w) -> (B, C, 1, H, W), about [-1, 1], not clipped."""
        pixels = self.vae.decode_nhwc(_without_time(latents, LATENTS).transpose(0, 2, 3, 1), tiling=self.tiling)
        return pixels.transpose(0, 3, 1, 2)[:, :, None]


def _without_time(array: mx.array, advice: str) -> mx.array:
    """Drop a time axis of length 1."""
    array = as_array(array, "input is", "(B, C, H, W) or (B, C, 1, H, W)", advice)
    if array.ndim == 5 and array.shape[2] == 1:
        return array[:, :, 0]
    if array.ndim != 4:
        raise ImageError(f"expected (B, C, H, W) or (B, C, 1, H, W), not {tuple(array.shape)}")
    return array
