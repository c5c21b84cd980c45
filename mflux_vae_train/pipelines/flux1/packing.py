"""Latents <-> tokens of FLUX.1's transformer: one token per 2x2 patch, with a position on three axes."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae.errors import ImageError

PATCH = 2
VAE_FACTOR = 8
"""Pixels per latent in each direction."""


def pack(latents: mx.array) -> mx.array:
    """(B, H, W, C) -> (B, H/2 * W/2, 4 C); a token's channels are ordered (C, row in patch, column in patch).

    Raises:
        ImageError: an odd height or width.
    """
    batch, height, width, channels = latents.shape
    if height % PATCH or width % PATCH:
        raise ImageError(
            f"latents of {height}x{width} do not divide into 2x2 patches: "
            "FLUX takes images whose sides are multiples of 16"
        )
    patches = latents.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: mx.array, height: int, width: int) -> mx.array:
    """The inverse of `pack`: (B, H/2 * W/2, 4 C) -> (B, H, W, C), sizes in latents."""
    patches = tokens.reshape(tokens.shape[0], height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(tokens.shape[0], height, width, -1)


def image_ids(height: int, width: int) -> mx.array:
    """Positions (0, row, column) of the patches of latents of this size: (H/2 * W/2, 3) float32."""
    rows, columns = mx.arange(height // PATCH), mx.arange(width // PATCH)
    row, column = mx.meshgrid(rows, columns, indexing="ij")
    return mx.stack([mx.zeros_like(row), row, column], axis=-1).reshape(-1, 3).astype(mx.float32)


def text_ids(length: int) -> mx.array:
    """Positions of text tokens, all at the origin: (L, 3) float32. T5's embeddings contain the order."""
    return mx.zeros((length, 3))
