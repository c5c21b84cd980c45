"""The encoder's answer: a diagonal Gaussian over latents."""

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
        logvar: same shape; log variance, clamped to [-30, 20] as in diffusers and latent-diffusion; -inf for a
            `point`.
    """

    mean: mx.array
    logvar: mx.array

    @classmethod
    def from_moments(cls, moments: mx.array) -> DiagonalGaussian:
        """Split (..., 2C), of any dtype, into mean and log variance."""
        moments, channels = moments.astype(mx.float32), moments.shape[-1] // 2
        return cls(moments[..., :channels], _clamped(moments[..., channels:]))

    @classmethod
    def point(cls, mean: mx.array) -> DiagonalGaussian:
        """Of an encoder without variances: all mass at the mean, which every sample is; log variances are -inf."""
        mean = mean.astype(mx.float32)
        return cls(mean, _nowhere(mean))

    def mode(self) -> mx.array:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, key: mx.array | None = None) -> mx.array:
        """mean + std * noise (Kingma and Welling 2014); differentiable in both.

        Args:
            key: random key; None draws from MLX's global state.
        """
        return self.mean + mx.exp(0.5 * self.logvar) * mx.random.normal(self.mean.shape, key=key)

    def kl(self) -> mx.array:
        """Kullback-Leibler divergence from the standard normal, in nats, summed per sample. (B,).

        A point's, which is infinite, counts as 0, as in diffusers.
        """
        terms = mx.square(self.mean) + mx.exp(self.logvar) - 1.0 - self.logvar
        terms = mx.where(mx.isinf(self.logvar), 0.0, terms)
        return 0.5 * terms.reshape(terms.shape[0], -1).sum(axis=1)


@pointwise
def _clamped(logvar: mx.array) -> mx.array:
    return mx.clip(logvar, *LOGVAR_RANGE)


@pointwise
def _nowhere(mean: mx.array) -> mx.array:
    return mx.full(mean.shape, -mx.inf)
