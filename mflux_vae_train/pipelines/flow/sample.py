"""Sampling from a rectified flow with Euler steps and classifier-free guidance, and decoding in batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx

from mflux_vae.vae import VAE
from mflux_vae_train.pipelines.flow.predict import Velocity
from mflux_vae_train.pipelines.flow.schedule import euler_step

DECODED_AT_ONCE = 2**20
"""Pixels decoded in one batch: one image of 1024 x 1024, or many small ones."""


def sample(velocity: Velocity, noise: mx.array, sigmas: Sequence[float], *, guidance: float | None = None) -> mx.array:
    """Follow the velocity from noise to clean latents.

    Args:
        velocity: with guidance it is called with 2 B rows, of which the first B are unconditional.
        noise: (B, ...).
        sigmas: noise levels, falling to 0.
        guidance: classifier-free guidance scale (Ho and Salimans 2022); None for no guidance.
    """
    latents = noise
    for sigma, next_sigma in pairwise(sigmas):
        rows = latents if guidance is None else mx.concatenate([latents, latents])
        step = velocity(rows, mx.full(rows.shape[:1], sigma))
        if guidance is not None:
            unconditional, conditional = mx.split(step, 2)
            step = unconditional + guidance * (conditional - unconditional)
        latents = euler_step(latents, step, sigma, next_sigma)
        mx.eval(latents)
    return latents


def decode(vae: VAE, latents: mx.array) -> mx.array:
    """Latents (B, h, w, C) -> images (B, H, W, 3), float32, not clipped; `DECODED_AT_ONCE` pixels per batch."""
    pixels = latents.shape[1] * latents.shape[2] * vae.spatial_scale**2
    images = []
    for start in range(0, latents.shape[0], rows := max(1, DECODED_AT_ONCE // pixels)):
        # float32 in any case: numpy has no bfloat16
        images.append(vae.decode_nhwc(latents[start : start + rows]).astype(mx.float32))
        mx.eval(images[-1])
    return mx.concatenate(images)
