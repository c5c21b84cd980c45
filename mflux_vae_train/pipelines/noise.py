"""Noise levels in training: weighting schemes, their parameters, and the loss of a prediction.

MLX is imported when arrays are computed, so that a command line can list the schemes without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mflux_vae.errors import SettingsError

if TYPE_CHECKING:
    import mlx.core as mx

SCHEMES: Mapping[str, Sequence[str]] = {
    "none": (),
    "uniform": (),
    "logit_normal": ("logit_mean", "logit_std"),
    "mode": ("mode_scale",),
    "cosmap": (),
    "sigma_sqrt": (),
    "flux_shift": ("logit_mean", "logit_std"),
    "schnell": (),
    "debiased": (),
}
"""Weighting schemes and the parameters of `NoiseSampling` that each reads."""

SCHNELL_STEPS = 4
"""Noise levels that FLUX.1 schnell was distilled to: 1/4, 2/4, 3/4 and 1."""


@dataclass(frozen=True, kw_only=True)
class NoiseSampling:
    """How training draws noise levels and weights errors (Esser et al. 2024, section 3.1).

    The noise level is 1 - u with u in [0, 1). As in diffusers' scripts, a large u means little noise.

    - ``none``, ``uniform``: u is uniform.
    - ``logit_normal``: u = sigmoid(N(logit_mean, logit_std)).
    - ``mode``: u = 1 - r - mode_scale (cos^2(pi r / 2) - 1 + r), r uniform.
    - ``cosmap``: u is uniform; the error is multiplied by 2 / (pi (1 - 2 s + 2 s^2)) at noise level s.
    - ``sigma_sqrt``: u is uniform; the error is multiplied by s^-2.
    - ``flux_shift``: as logit_normal, then shifted towards noise, further for larger images.
    - ``schnell``: s is 1/4, 2/4, 3/4 or 1, with equal probability.
    - ``debiased``: u is uniform; the error is weighted as in debiased estimation (Yu et al. 2023). Discrete schedules.

    Attributes:
        logit_mean: above 0 means less noise (kohya's scripts draw the noise level itself: there it means more).
        mode_scale: from -1 to 2 / (pi - 2); other values give levels outside [0, 1].
        snr_gamma: limit of the Min-SNR weight of instance samples (Hang et al. 2023), for discrete schedules; None for
            no such weight.
        noise_offset: standard deviation of a constant that is added to the noise of each channel; learns brightness.
        quantile: in (0, 1); all samples get the level of this quantile of the random numbers, instead of random ones.

    Raises:
        SettingsError: an unknown scheme.
    """

    scheme: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    quantile: float | None = None

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise SettingsError(f"weighting scheme {self.scheme!r} is unknown; use one of {', '.join(SCHEMES)}")

    @property
    def draws_normal(self) -> bool:
        """Whether `training_levels` needs standard normal numbers; otherwise uniform ones."""
        return "logit_mean" in SCHEMES[self.scheme]

    def draws(self, key: mx.array) -> mx.array:
        """Numbers (B,) for `training_levels`, row i a function of key[i]; `key` is (B, 2)."""
        from statistics import NormalDist

        import mlx.core as mx

        if self.quantile is not None:
            number = NormalDist().inv_cdf(self.quantile) if self.draws_normal else self.quantile
            return mx.full(key.shape[:1], number)
        draw = mx.random.normal if self.draws_normal else mx.random.uniform
        return mx.vmap(lambda one: draw(shape=(), key=one))(key)


class Prediction(NamedTuple):
    """Output of a denoiser for noised latents, and its target; float32.

    Attributes:
        prediction, target: (B, ...), the shape of the latents.
        weight: factor of each sample's squared error (B,).
        sigma: noise level of each sample (B,), from 0 (clean) to 1 (pure noise).
    """

    prediction: mx.array
    target: mx.array
    weight: mx.array
    sigma: mx.array

    def loss(self, mask: mx.array | None = None) -> mx.array:
        """Weighted squared error, averaged over each sample: (B,).

        Args:
            mask: weight of each position in the average, (B, h, w, 1) for latents (B, h, w, C), not negative.
                A sample whose mask is all zero has loss 0.
        """
        import mlx.core as mx

        squared = mx.square(self.prediction - self.target)
        if mask is None:
            return self.weight * squared.flatten(1).mean(axis=1)
        total = mx.maximum(mask.flatten(1).mean(axis=1), 1e-6)
        return self.weight * (squared * mask).flatten(1).mean(axis=1) / total


def training_levels(draws: mx.array, sampling: NoiseSampling) -> mx.array:
    """Random numbers (B,) -> noise levels (B,) in [0, 1], before any shift.

    Args:
        draws: standard normal if `sampling.draws_normal`, else uniform in [0, 1).
    """
    import mlx.core as mx

    if sampling.draws_normal:
        return mx.sigmoid(-(sampling.logit_mean + sampling.logit_std * draws))
    if sampling.scheme == "mode":
        return draws + sampling.mode_scale * (mx.square(mx.cos(math.pi / 2 * draws)) - 1 + draws)
    if sampling.scheme == "schnell":
        return 1 - mx.floor(draws * SCHNELL_STEPS) / SCHNELL_STEPS
    return 1 - draws


def error_weight(sigma: mx.array, sampling: NoiseSampling) -> mx.array:
    """Factor of the squared error at noise levels sigma: (B,) -> (B,) float32."""
    import mlx.core as mx

    if sampling.scheme == "sigma_sqrt":
        return 1 / mx.square(sigma)
    if sampling.scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * mx.square(sigma)))
    return mx.ones_like(sigma)


def normal(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Standard normal float32 (B, *shape); row i is a function of key[i]."""
    import mlx.core as mx

    return mx.vmap(lambda one: mx.random.normal(shape, key=one))(key)
