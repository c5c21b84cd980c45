"""Sampling with DDIM, Euler or Euler-ancestral steps and classifier-free guidance."""

from __future__ import annotations

import math

import mlx.core as mx

from mflux_vae_train.pipelines.noise import normal
from mflux_vae_train.pipelines.stable_diffusion.predict import Network
from mflux_vae_train.pipelines.stable_diffusion.schedule import DiscreteSchedule, Level


def sample(
    network: Network,
    noise: mx.array,
    schedule: DiscreteSchedule,
    *,
    steps: int,
    key: mx.array,
    guidance: float | None = None,
) -> mx.array:
    """Follow the network's predictions from noise to clean latents.

    Args:
        network: with guidance it is called with 2 B rows, of which the first B are unconditional.
        noise: standard normal, (B, ...).
        key: (B, 2), for the noise that Euler-ancestral steps add.
        guidance: classifier-free guidance scale (Ho and Salimans 2022); None for no guidance.

    Raises:
        SettingsError: fewer than one step, or more than there are timesteps.
    """
    latents = noise * schedule.initial_scale(steps)
    ancestral = schedule.sampler == "euler_ancestral"
    keys = mx.vmap(lambda one: mx.random.split(one, steps))(key)
    for index, level in enumerate(schedule.levels(steps)):
        rows = latents if guidance is None else mx.concatenate([latents, latents])
        predicted = network(rows, mx.full(rows.shape[:1], level.timestep))
        if guidance is not None:
            unconditional, conditional = mx.split(predicted, 2)
            predicted = unconditional + guidance * (conditional - unconditional)
        clean, direction = _parts(latents, predicted, level.signal, schedule.prediction_type)
        if ancestral and level.next_signal < 1:
            direction = _renewed(direction, level, normal(keys[:, index], noise.shape[1:]))
        latents = math.sqrt(level.next_signal) * clean + math.sqrt(1 - level.next_signal) * direction
        mx.eval(latents)
    return latents


def _renewed(noise: mx.array, level: Level, fresh: mx.array) -> mx.array:
    """Replace a part of the noise with fresh noise before the step to the next level; the variance stays."""
    sigma, following = (1 / signal - 1 for signal in (level.signal, level.next_signal))  # squared
    kept = following / sigma
    return math.sqrt(kept) * noise + math.sqrt(1 - kept) * fresh


def _parts(latents: mx.array, predicted: mx.array, signal: float, prediction_type: str) -> tuple[mx.array, mx.array]:
    """Predicted image x_0 and noise e, where x_t = sqrt(a) x_0 + sqrt(1 - a) e."""
    a, b = math.sqrt(signal), math.sqrt(1 - signal)
    if prediction_type == "epsilon":
        return (latents - b * predicted) / a, predicted
    return a * latents - b * predicted, a * predicted + b * latents
