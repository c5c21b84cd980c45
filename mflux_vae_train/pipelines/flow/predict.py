"""The training objective of rectified flow: x_s = (1 - s) x0 + s e with target e - x0 (Lipman et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule, noised
from mflux_vae_train.pipelines.noise import NoiseSampling, Prediction, error_weight, normal

Velocity: TypeAlias = Callable[[mx.array, mx.array], mx.array]
"""Latents (B, ...) and noise levels (B,) -> velocity e - x0, float32, of the latents' shape."""


def predict(
    velocity: Velocity,
    latents: mx.array,
    *,
    key: mx.array,
    schedule: FlowMatchSchedule,
    sampling: NoiseSampling,
    image_tokens: int,
) -> Prediction:
    """Velocity at a random noise level of each sample, and its target. Noise and target are float32.

    Args:
        latents: clean latents (B, ...).
        key: (B, 2); row i alone determines noise and noise level of sample i.
        image_tokens: tokens of an image in the transformer, for schemes that shift by size.
    """
    check_sampling(sampling)
    keys = mx.vmap(lambda one: mx.random.split(one, 2))(key)
    clean = latents.astype(mx.float32)
    noise = normal(keys[:, 0], latents.shape[1:])
    sigma = schedule.training_sigmas(keys[:, 1], sampling, image_tokens=image_tokens)
    predicted = velocity(noised(clean, noise, sigma), sigma)
    return Prediction(predicted, noise - clean, error_weight(sigma, sampling), sigma)


def check_sampling(sampling: NoiseSampling) -> None:
    """
    Raises:
        SettingsError: an option of discrete schedules.
    """
    given = [f"--{name}" for name in ("snr_gamma", "noise_offset") if getattr(sampling, name)]
    if sampling.scheme == "debiased":
        given.append("--weighting_scheme debiased")
    if given:
        raise SettingsError(
            f"{', '.join(given)}: for models with a discrete noise schedule, this one is a rectified flow"
        )
