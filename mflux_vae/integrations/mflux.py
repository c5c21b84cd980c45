"""A VAE in the shape of mflux's own, so that it can take the place of `flux.vae`. mflux itself is not needed.

mflux (0.24) calls `encode` and `decode` with NCHW in [-1, 1], with or without an axis of length one for time after
the channels, and takes both with that axis; it clips pictures itself. No type is checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import ImageError
from mflux_vae.tiling.plan import TilingOption

if TYPE_CHECKING:
    from mflux_vae.vae import VAE


class MfluxVAE(nn.Module):
    """Takes the place of `flux.vae`: `flux.vae = vae.as_mflux()`.

    Its parameters keep the names they have in the VAE: mflux saves them, but does not open them as its own.

    Attributes:
        vae: what encodes and decodes.
        tiling: how it cuts large images; see `VAE`.
        latent_channels, spatial_scale, scaling_factor, shift_factor: the VAE's.
        decode_mode: tells mflux that this VAE decodes in its own way: mflux's own tiles, which have each its own
            norm statistics and so shift in tone, are not applied. Large latents are cut by the VAE itself.
    """

    decode_mode = "own"

    def __init__(self, vae: VAE, tiling: TilingOption = None):
        super().__init__()
        self.vae, self.tiling = vae, tiling
        self.latent_channels = vae.latent_channels
        self.spatial_scale = vae.spatial_scale
        self.scaling_factor = vae.scaling_factor
        self.shift_factor = vae.shift_factor

    def encode(self, image: mx.array) -> mx.array:
        """(B, C, H, W) or (B, C, 1, H, W) in [-1, 1] -> scaled latents (B, latent_channels, 1, h, w), the mode."""
        pixels = _flat(image).transpose(0, 2, 3, 1)
        return self.vae.encode_nhwc(pixels, tiling=self.tiling).transpose(0, 3, 1, 2)[:, :, None]

    def decode(self, latents: mx.array) -> mx.array:
        """Scaled latents (B, C, h, w) or (B, C, 1, h, w) -> (B, C, 1, H, W), about [-1, 1], not clipped."""
        pixels = self.vae.decode_nhwc(_flat(latents).transpose(0, 2, 3, 1), tiling=self.tiling)
        return pixels.transpose(0, 3, 1, 2)[:, :, None]


def _flat(array: mx.array) -> mx.array:
    """Without the axis of time."""
    if array.ndim == 5 and array.shape[2] == 1:
        return array[:, :, 0]
    if array.ndim != 4:
        raise ImageError(f"expected (B, C, H, W) or (B, C, 1, H, W), not {tuple(array.shape)}")
    return array
