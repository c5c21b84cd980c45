"""Sampling from a rectified flow with Euler steps and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx

from mflux_vae_train.pipelines.flow.predict import Velocity
from mflux_vae_train.pipelines.flow.schedule import euler_step


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
