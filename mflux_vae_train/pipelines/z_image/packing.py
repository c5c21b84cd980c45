"""Latents <-> tokens of Z-Image's transformer: one token per 2x2 patch, in multiples of 32, and their positions."""

from __future__ import annotations

from typing import TypeVar

import mlx.core as mx

from mflux_vae.errors import ImageError

Count = TypeVar("Count", int, mx.array)

PATCH = 2
VAE_FACTOR = 8
"""Pixels per latent in each direction."""

TOKEN_MULTIPLE = 32
"""Image and caption are each padded to a multiple of this many tokens. The pads are attended to."""


def padded(tokens: Count) -> Count:
    """The next multiple of `TOKEN_MULTIPLE`."""
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def pack(latents: mx.array) -> mx.array:
    """(B, H, W, C) -> (B, H/2 * W/2, 4 C); a token's channels are ordered (row in patch, column in patch, C).

    Raises:
        ImageError: an odd height or width.
    """
    batch, height, width, channels = latents.shape
    if height % PATCH or width % PATCH:
        raise ImageError(
            f"latents of {height}x{width} do not divide into 2x2 patches: "
            "Z-Image takes images whose sides are multiples of 16"
        )
    patches = latents.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, PATCH * PATCH * channels)


def unpack(tokens: mx.array, height: int, width: int) -> mx.array:
    """The inverse of `pack`: (B, H/2 * W/2, 4 C) -> (B, H, W, C), sizes in latents."""
    patches = tokens.reshape(tokens.shape[0], height // PATCH, width // PATCH, PATCH, PATCH, -1)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(tokens.shape[0], height, width, -1)


def text_ids(length: int) -> mx.array:
    """Positions (1, 0, 0), (2, 0, 0), ... of a caption's tokens: (L, 3)."""
    position = mx.arange(1, length + 1)
    return mx.stack([position, mx.zeros_like(position), mx.zeros_like(position)], axis=-1)


def image_ids(height: int, width: int, caption: mx.array) -> mx.array:
    """Positions (P + 1, row, column) of the patches of latents of this size, and (0, 0, 0) of pads: (B, N, 3).

    Args:
        caption: (B,) tokens P of each row's padded caption.
    """
    rows, columns = mx.arange(height // PATCH), mx.arange(width // PATCH)
    row, column = (axis.reshape(-1) for axis in mx.meshgrid(rows, columns, indexing="ij"))
    shape = (len(caption), row.size)
    ids = mx.stack(
        [mx.broadcast_to(caption[:, None] + 1, shape), mx.broadcast_to(row, shape), mx.broadcast_to(column, shape)],
        axis=-1,
    )
    return mx.pad(ids, [(0, 0), (0, padded(row.size) - row.size), (0, 0)])
