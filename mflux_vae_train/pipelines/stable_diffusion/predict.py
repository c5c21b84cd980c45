"""The training objective of discrete diffusion: noise or v at a random timestep, and the weight of its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.noise import NoiseSampling, Prediction, normal, training_levels
from mflux_vae_train.pipelines.stable_diffusion.schedule import DiscreteSchedule

Network: TypeAlias = Callable[[mx.array, mx.array], mx.array]
"""Noised latents (B, ...) and timesteps (B,) float32 -> predicted noise or v, float32, of the latents' shape."""

SCHEMES = ("none", "uniform", "logit_normal", "mode", "debiased")
"""Weighting schemes of `noise.SCHEMES` that apply to discrete timesteps."""

_MOST_SNR = 1000.0


def check_sampling(sampling: NoiseSampling) -> None:
    """
    Raises:
        SettingsError: a scheme of rectified flow.
    """
    if sampling.scheme not in SCHEMES:
        raise SettingsError(
            f"--weighting_scheme {sampling.scheme} is for rectified flows; this model takes {', '.join(SCHEMES)}"
        )


def predict(
    network: Network, latents: mx.array, *, key: mx.array, schedule: DiscreteSchedule, sampling: NoiseSampling
) -> Prediction:
    """What the network predicts at a random timestep of each sample, and its target. Noise and target are float32.

    Args:
        latents: clean latents (B, ..., C).
        key: (B, 2); row i alone determines noise and timestep of sample i.
    """
    check_sampling(sampling)
    keys = mx.vmap(lambda one: mx.random.split(one, 3))(key)
    clean = latents.astype(mx.float32)
    noise = normal(keys[:, 0], latents.shape[1:])
    timesteps = training_timesteps(keys[:, 1], schedule, sampling)
    signal = mx.array(schedule.signals)[timesteps]
    if sampling.noise_offset:
        channels = (*(1,) * (latents.ndim - 2), latents.shape[-1])
        noise = noise + sampling.noise_offset * normal(keys[:, 2], channels)
    predicted = network(noised(clean, noise, signal), timesteps.astype(mx.float32))
    target = noise if schedule.prediction_type == "epsilon" else velocity(clean, noise, signal)
    weight = error_weight(signal, schedule, sampling)
    return Prediction(predicted, target, weight, (timesteps + 0.5) / schedule.num_train_timesteps)


def training_timesteps(key: mx.array, schedule: DiscreteSchedule, sampling: NoiseSampling) -> mx.array:
    """One timestep per sample: (B,) int32; row i is a function of key[i]."""
    levels = training_levels(sampling.draws(key), sampling)
    count = schedule.num_train_timesteps
    return mx.clip(mx.floor(levels * count), 0, count - 1).astype(mx.int32)


def error_weight(signal: mx.array, schedule: DiscreteSchedule, sampling: NoiseSampling) -> mx.array:
    """Factor of the squared error at a_t: (B,) -> (B,) float32.

    Min-SNR (Hang et al. 2023) and debiased estimation (Yu et al. 2023), for noise and for v.
    """
    snr, is_noise = signal / mx.maximum(1 - signal, 1e-12), schedule.prediction_type == "epsilon"
    weight = mx.ones_like(signal)
    if sampling.scheme == "debiased":
        weight = mx.rsqrt(mx.minimum(snr, _MOST_SNR)) if is_noise else 1 / (snr + 1)
    if sampling.snr_gamma is not None:
        weight = weight * mx.minimum(snr, sampling.snr_gamma) / (snr if is_noise else snr + 1)
    return weight


def noised(clean: mx.array, noise: mx.array, signal: mx.array) -> mx.array:
    """x_t of clean latents and noise (B, ...) at a_t (B,)."""
    signal = _rows(signal, clean)
    return mx.sqrt(signal) * clean + mx.sqrt(1 - signal) * noise


def velocity(clean: mx.array, noise: mx.array, signal: mx.array) -> mx.array:
    """v = sqrt(a) e - sqrt(1 - a) x_0 at a_t (B,)."""
    signal = _rows(signal, clean)
    return mx.sqrt(signal) * noise - mx.sqrt(1 - signal) * clean


def _rows(values: mx.array, like: mx.array) -> mx.array:
    return values.reshape(-1, *(1,) * (like.ndim - 1))
