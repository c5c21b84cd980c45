"""The posterior of an encoder: a diagonal Gaussian over latents."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mflux_vae.kernels.overrides import pointwise

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """A normal distribution with independent components.

    Attributes:
        mean: (B, ...) unscaled latents, float32.
        logvar: log variance, same shape, clamped to [-30, 20] as in diffusers and latent-diffusion; -inf for
            `point`.
    """

    mean: mx.array
    logvar: mx.array

    @classmethod
    def from_moments(cls, moments: mx.array) -> DiagonalGaussian:
        """Split moments (..., 2C) of any dtype into mean and log variance."""
        moments, channels = moments.astype(mx.float32), moments.shape[-1] // 2
        return cls(moments[..., :channels], _clamped(moments[..., channels:]))

    @classmethod
    def point(cls, mean: mx.array) -> DiagonalGaussian:
        """The posterior of an encoder without variances: every sample is the mean."""
        mean = mean.astype(mx.float32)
        return cls(mean, _minus_infinity(mean))

    def mode(self) -> mx.array:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, key: mx.array | None = None) -> mx.array:
        """Draw mean + std * noise (Kingma and Welling 2014); differentiable in mean and logvar.

        Args:
            key: random key; None uses MLX's global state.
        """
        return self.mean + mx.exp(0.5 * self.logvar) * mx.random.normal(self.mean.shape, key=key)

    def kl(self) -> mx.array:
        """Kullback-Leibler divergence from the standard normal in nats, summed per sample: (B,).

        0 for `point`, as in diffusers (the true value is infinite).
        """
        terms = mx.square(self.mean) + mx.exp(self.logvar) - 1.0 - self.logvar
        terms = mx.where(mx.isinf(self.logvar), 0.0, terms)
        return 0.5 * terms.reshape(terms.shape[0], -1).sum(axis=1)


@pointwise
def _clamped(logvar: mx.array) -> mx.array:
    return mx.clip(logvar, *LOGVAR_RANGE)


@pointwise
def _minus_infinity(mean: mx.array) -> mx.array:
    return mx.full(mean.shape, -mx.inf)
