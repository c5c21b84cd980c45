"""Noise schedule of rectified flow: x_sigma = (1 - sigma) x0 + sigma noise, sigma in [0, 1].

The velocity is noise - x0; sampling follows it from sigma 1 to 0 with Euler steps (Lipman et al. 2023, Esser
et al. 2024). The fields are those of diffusers' FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import numpy as np

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.loading.config_check import JSONConfig
from mflux_vae_train.pipelines.noise import NoiseSampling, training_levels

Levels = TypeVar("Levels", mx.array, np.ndarray)

# Options of diffusers' scheduler that no pipeline here supports: ignoring another value would change the images.
_FIXED = {
    "time_shift_type": "exponential",
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


@dataclass(frozen=True, kw_only=True)
class FlowMatchSchedule(JSONConfig):
    """Noise levels, shifted towards noise by a fixed factor or by the number of image tokens.

    Attributes:
        num_train_timesteps: kept for the file; levels here are fractions of it.
        shift: sigma -> shift sigma / (1 + (shift - 1) sigma), where `use_dynamic_shifting` is off.
        use_dynamic_shifting: shift by e^mu instead, mu linear in the number of image tokens: `base_shift` at
            `base_image_seq_len`, `max_shift` at `max_image_seq_len`.
    """

    kinds: ClassVar[dict[str, object]] = {"_class_name": "FlowMatchEulerDiscreteScheduler"}

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlowMatchSchedule:
        """As `JSONConfig.from_dict`, from scheduler_config.json."""
        for name, value in _FIXED.items():
            if values.get(name, value) != value:
                raise SettingsError(f"scheduler_config.json: {name}={values[name]!r} is not supported, {value!r} is")
        return super().from_dict(values)

    def shifted(self, sigma: Levels, image_tokens: int) -> Levels:
        """Shift noise levels towards noise as configured; 0 and 1 stay."""
        if self.use_dynamic_shifting:
            return self.shifted_by_size(sigma, image_tokens)
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def shifted_by_size(self, sigma: Levels, image_tokens: int) -> Levels:
        """Shift noise levels towards noise by the number of image tokens, also if sampling does not."""
        return exponential_shift(sigma, self._mu(image_tokens))

    def _mu(self, image_tokens: int) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return image_tokens * slope + (self.base_shift - slope * self.base_image_seq_len)

    def sampling_mu(self, image_tokens: int, steps: int) -> float:
        """Exponent of the shift in sampling, if `use_dynamic_shifting`."""
        return self._mu(image_tokens)

    def sigmas(self, steps: int, image_tokens: int) -> np.ndarray:
        """Noise levels of sampling, from 1 to 0: (steps + 1,) float32.

        Args:
            image_tokens: tokens of the image in the transformer.

        Raises:
            SettingsError: fewer than one step.
        """
        if steps < 1:
            raise SettingsError(f"sampling needs at least 1 step, not {steps}")
        levels = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
        if self.use_dynamic_shifting:
            shifted = exponential_shift(levels, self.sampling_mu(image_tokens, steps))
        else:
            shifted = self.shifted(levels, image_tokens)
        return np.append(shifted, np.float32(0))

    def training_sigmas(self, key: mx.array, sampling: NoiseSampling, *, image_tokens: int) -> mx.array:
        """One noise level per sample: (B,) float32 in (0, 1], row i a function of key[i]; `key` is (B, 2).

        As in diffusers' scripts, training applies a fixed `shift` and does not shift by size. The scheme
        ``flux_shift`` does: it draws levels as FLUX.1 dev samples them.
        """
        levels = training_levels(sampling.draws(key), sampling)
        # the lowest level in diffusers' table: at 0 there is nothing to predict
        levels = mx.maximum(levels, 1 / self.num_train_timesteps)
        if sampling.scheme == "flux_shift":
            return self.shifted_by_size(levels, image_tokens)
        return levels if self.use_dynamic_shifting else self.shifted(levels, image_tokens)


def exponential_shift(sigma: Levels, mu: float) -> Levels:
    """Shift noise levels towards noise by e^mu; 0 and 1 stay."""
    return math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))


def noised(latents: mx.array, noise: mx.array, sigma: mx.array) -> mx.array:
    """x_sigma of clean latents and noise (B, ...), sigma (B,)."""
    sigma = sigma.reshape(-1, *(1,) * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def euler_step(latents: mx.array, velocity: mx.array, sigma: float, next_sigma: float) -> mx.array:
    """Follow the velocity from one noise level to the next."""
    return latents + (next_sigma - sigma) * velocity
