"""Discrete noise schedule of Stable Diffusion: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, t = 0, 1, ... (Ho et al. 2020).

One sampler covers diffusers' DDIM (Song et al. 2021, eta 0) and Euler (Karras et al. 2022): in x / sqrt(a) they take
the same step; timesteps and the last level differ. The fields are those of diffusers' schedulers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.loading.config_check import JSONConfig

logger = logging.getLogger(__name__)

Sampler = Literal["ddim", "euler", "euler_ancestral"]

SAMPLERS: Mapping[str, Sampler] = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}
"""By diffusers' class. Other classes are replaced by DDIM; training does not depend on it."""

_DEFAULT_SPACING: Mapping[Sampler, str] = {"ddim": "leading", "euler": "linspace", "euler_ancestral": "linspace"}

# Options that change the training or the meaning of a prediction; another value than these is refused.
_FIXED = {"trained_betas": None, "thresholding": False, "clip_sample": False}

_OTHER_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

_LEAST_SIGNAL = 2.0**-24
"""a_t that diffusers' Euler samplers take for pure noise, whose sigma is infinite."""


class Level(NamedTuple):
    """One sampling step.

    Attributes:
        timestep: input of the network; not whole where Euler interpolates.
        signal: share of the image in the variance before the step, a_t.
        next_signal: the same after it; 1 for a clean image.
    """

    timestep: float
    signal: float
    next_signal: float


@dataclass(frozen=True, kw_only=True)
class DiscreteSchedule(JSONConfig):
    """Noise levels of training and sampling.

    Attributes:
        prediction_type: what the network predicts: the noise e, or v = sqrt(a) e - sqrt(1 - a) x_0 (Salimans and Ho
            2022).
        timestep_spacing: which timesteps are sampled; None: as the sampler's class in diffusers does by default.
        set_alpha_to_one: whether DDIM ends at a clean image or at level 0.
        rescale_betas_zero_snr: shift the levels so that the last is pure noise (Lin et al. 2023, algorithm 1).
        sampler: how images are drawn; in the file it is the name of the class.
    """

    kinds: ClassVar[dict[str, object]] = {"_diffusers_version": "0.30.0"}

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["scaled_linear", "linear"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: bool = False
    sampler: Sampler = "ddim"

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise SettingsError(
                f"scheduler config: {self.num_train_timesteps} timesteps with beta from {self.beta_start:g} to"
                f" {self.beta_end:g} are no noise schedule"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise SettingsError(
                "scheduler config: rescale_betas_zero_snr needs prediction_type v_prediction: noise shows no image"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiscreteSchedule:
        """Read a parsed scheduler_config.json.

        Raises:
            SettingsError: an unsupported option.
        """
        for name, expected in _FIXED.items():
            if values.get(name, expected) != expected:
                raise SettingsError(f"scheduler_config.json: {name}={values[name]!r} is not supported, {expected!r} is")
        for name, hint in (
            ("prediction_type", "epsilon or v_prediction"),
            ("beta_schedule", "scaled_linear or linear"),
        ):
            if name in values and values[name] not in hint:
                raise SettingsError(f"scheduler_config.json: {name}={values[name]!r} is not supported, {hint} is")
        known = {field.name for field in fields(cls)} - {"sampler"}
        name = values.get("_class_name", "DDIMScheduler")
        others = [name] * (name not in SAMPLERS) + [option for option in _OTHER_LEVELS if values.get(option)]
        if others:
            logger.warning(
                "images are drawn with DDIM or Euler steps; the scheduler's %s is not used", ", ".join(others)
            )
        defaults = {"set_alpha_to_one": name == "DDIMScheduler"}
        given = {name: value for name, value in values.items() if name in known}
        return cls(sampler=SAMPLERS.get(name, "ddim"), **{**defaults, **given})

    def to_dict(self) -> dict[str, Any]:
        """The scheduler_config.json that diffusers reads."""
        values = super().to_dict()
        sampler = values.pop("sampler")
        if values["timestep_spacing"] is None:
            values["timestep_spacing"] = _DEFAULT_SPACING[sampler]
        name = next(name for name, each in SAMPLERS.items() if each == sampler)
        return {"_class_name": name, **values, "clip_sample": False, "trained_betas": None}

    @cached_property
    def signals(self) -> np.ndarray:
        """a_t, the share of the image in the variance at each timestep: (num_train_timesteps,) float32, falling."""
        start, end, count = self.beta_start, self.beta_end, self.num_train_timesteps
        if self.beta_schedule == "scaled_linear":
            betas = np.square(np.linspace(math.sqrt(start), math.sqrt(end), count, dtype=np.float32))
        else:
            betas = np.linspace(start, end, count, dtype=np.float32)
        signals = np.cumprod(1 - betas, dtype=np.float32)
        if self.rescale_betas_zero_snr:
            roots = np.sqrt(signals)
            roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
            signals = np.square(roots)
        return signals

    def levels(self, steps: int) -> list[Level]:
        """The sampling steps, from noise to image.

        Raises:
            SettingsError: fewer than one step, or more than there are timesteps.
        """
        count = self.num_train_timesteps
        if not 1 <= steps <= count:
            raise SettingsError(f"sampling takes 1 to {count} steps, not {steps}")
        timesteps, every = self._timesteps(steps), np.arange(count)
        if self.sampler == "ddim":
            earlier = timesteps - count // steps
            last = 1.0 if self.set_alpha_to_one else self.signals[0]
            signals, following = self.signals[timesteps.astype(int)], self.signals[np.maximum(earlier, 0).astype(int)]
            following = np.where(earlier < 0, last, following)
        else:  # diffusers interpolates sigma
            sigmas = np.sqrt(1 / np.maximum(self.signals.astype(np.float64), _LEAST_SIGNAL) - 1)
            signals = 1 / (np.square(np.interp(timesteps, every, sigmas)) + 1)
            following = np.append(signals[1:], 1.0)
        return [Level(*map(float, row)) for row in zip(timesteps, signals, following, strict=True)]

    def initial_scale(self, steps: int) -> float:
        """Standard deviation of the noise that sampling starts from.

        diffusers' Euler samplers start at the last timestep from its noise alone, which has sqrt(1 - a).
        """
        if self.sampler == "ddim" or self._spacing == "leading":
            return 1.0
        return math.sqrt(1 - self.levels(steps)[0].signal)

    @property
    def _spacing(self) -> str:
        return self.timestep_spacing or _DEFAULT_SPACING[self.sampler]

    def _timesteps(self, steps: int) -> np.ndarray:
        count = self.num_train_timesteps
        if self._spacing == "linspace":
            spaced = np.linspace(0, count - 1, steps)[::-1]
            return spaced if self.sampler != "ddim" else spaced.round()
        if self._spacing == "trailing":
            return np.round(count - np.arange(steps) * (count / steps)) - 1
        return np.minimum(np.arange(steps)[::-1] * (count // steps) + self.steps_offset, count - 1).astype(np.float64)
