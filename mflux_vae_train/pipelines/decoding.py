"""Decoding of latents in batches."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae.vae import VAE

DECODED_AT_ONCE = 2**20
"""Pixels decoded in one batch: one image of 1024 x 1024, or many small ones."""


def decode(vae: VAE, latents: mx.array) -> mx.array:
    """Latents (B, h, w, C) -> images (B, H, W, 3), float32 in [-1, 1]; `DECODED_AT_ONCE` pixels per batch."""
    pixels = latents.shape[1] * latents.shape[2] * vae.spatial_scale**2
    images = []
    for start in range(0, latents.shape[0], rows := max(1, DECODED_AT_ONCE // pixels)):
        # float32 in any case: numpy has no bfloat16
        images.append(vae.decode_nhwc(latents[start : start + rows]).astype(mx.float32))
        mx.eval(images[-1])
    return mx.clip(mx.concatenate(images), -1, 1)
