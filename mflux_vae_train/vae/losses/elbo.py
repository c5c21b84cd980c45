"""Losses of variational autoencoders: reconstruction errors, KL divergence, and their weighted sums.

Functions return one value per sample, (B,). Images are (B, ...) in any layout, latents (B, D) or (B, h, w, D) with
independent components. Divergences are in nats.

    total = reconstruction + beta KL                                        VAELoss (Kingma and Welling 2014)
    the same with annealed beta                                             BetaVAELoss (Higgins et al. 2017)
    total = reconstruction + alpha MI + beta TC + gamma dimension-wise KL   DisentangledVAELoss (Chen et al. 2018)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import mlx.core as mx

from mflux_vae.errors import SettingsError
from mflux_vae_train.vae.losses.total_correlation import Sampling, decompose_kl, log_weights

Number: TypeAlias = "float | mx.array"
Reduction: TypeAlias = Literal["sum", "mean"]
Distance: TypeAlias = Callable[[mx.array, mx.array], mx.array]
"""(reconstruction, target), both (B, ...) -> (B,)."""


def mse(reconstruction: mx.array, target: mx.array, *, reduction: Reduction = "sum") -> mx.array:
    """Squared error per sample. (B, ...) twice -> (B,)."""
    return _reduce(mx.square(reconstruction - target), reduction)


def l1(reconstruction: mx.array, target: mx.array, *, reduction: Reduction = "sum") -> mx.array:
    """Absolute error per sample. (B, ...) twice -> (B,)."""
    return _reduce(mx.abs(reconstruction - target), reduction)


def bce(reconstruction: mx.array, target: mx.array, *, reduction: Reduction = "sum") -> mx.array:
    """Binary cross entropy of probabilities, both in [0, 1]. (B, ...) twice -> (B,).

    Reconstructions are clipped to [1e-7, 1 - 1e-7], so a pixel contributes at most 16 nats.
    """
    p = mx.clip(reconstruction.astype(mx.float32), 1e-7, 1 - 1e-7)
    return _reduce(-(target * mx.log(p) + (1 - target) * mx.log(1 - p)), reduction)


RECONSTRUCTION: dict[str, Callable[..., mx.array]] = {"mse": mse, "l1": l1, "bce": bce}
"""Functions by name in the settings."""


def kl(mean: mx.array, logvar: mx.array, *, free_bits: float = 0.0) -> mx.array:
    """Kullback-Leibler divergence from the standard normal in nats. (B, ...) twice -> (B,).

    Args:
        free_bits: lower limit (nats) of each component's batch average (lambda in Kingma et al. 2016); components
            below it count this much and get no gradient.
    """
    return _flatten(_apply_free_bits(kl_terms(mean, logvar), free_bits)).sum(axis=1)


def kl_terms(mean: mx.array, logvar: mx.array) -> mx.array:
    """KL divergence of each component in nats, in the shape of `mean`."""
    mean, logvar = mean.astype(mx.float32), logvar.astype(mx.float32)
    return 0.5 * (mx.square(mean) + mx.exp(logvar) - 1 - logvar)


def active_units(mean: mx.array, *, threshold: float = 0.01) -> mx.array:
    """Number of components of the mean (B, D) with a variance above `threshold` (Burda et al. 2016)."""
    return (mx.var(_flatten(mean), axis=0) > threshold).sum()


def linear_beta(step: int, *, start: float, end: float, steps: int) -> float:
    """Rise linearly from `start` at step 0 to `end` at step `steps`, then stay there."""
    return end if step >= steps else start + (end - start) * step / steps


def cyclical_beta(step: int, *, start: float, end: float, steps: int, rising: float = 0.5) -> float:
    """Repeat every `steps` steps: rise linearly in the first fraction `rising`, then stay at `end` (Fu et al. 2019)."""
    return linear_beta(step % max(steps, 1), start=start, end=end, steps=max(round(rising * steps), 1))


ANNEALING: dict[str, Callable[..., float]] = {"linear": linear_beta, "cyclical": cyclical_beta}
"""Functions by name in the settings."""


class VAELoss:
    """Reconstruction + beta KL: `total, reconstruction, kl = loss(recon_x, x, mu, log_var)`, averages over the batch.

    Args:
        beta: weight of the divergence.
        loss_type: "mse", "l1" or "bce".
        reduction: "sum" or "mean" of the reconstruction error over a sample's N values. With "sum" and beta 1 the loss
            is the negative evidence lower bound; beta with "mean" corresponds to N * beta with "sum".
        free_bits: see `kl`.
        signed: images are in [-1, 1] instead of [0, 1].
        perceptual: distance of RGB images in [-1, 1], such as `mflux_vae.metrics.lpips.LPIPS`; added to the
            reconstruction error.
        perceptual_weight: its weight.

    Raises:
        SettingsError: unknown loss_type or reduction, or a negative weight.
    """

    def __init__(
        self,
        beta: float = 1.0,
        loss_type: str = "mse",
        *,
        reduction: Reduction = "sum",
        free_bits: float = 0.0,
        signed: bool = False,
        perceptual: Distance | None = None,
        perceptual_weight: float = 1.0,
    ) -> None:
        if loss_type not in RECONSTRUCTION:
            raise SettingsError(f"loss_type is {loss_type!r}; allowed are {', '.join(RECONSTRUCTION)}")
        if reduction not in ("sum", "mean"):
            raise SettingsError(f"reduction is {reduction!r}; allowed are sum, mean")
        for name, value in (("beta", beta), ("free_bits", free_bits), ("perceptual_weight", perceptual_weight)):
            if not value >= 0:
                raise SettingsError(f"{name} is {value}; at least 0 is allowed")
        self.beta, self.loss_type, self.reduction, self.free_bits = beta, loss_type, reduction, free_bits
        self.signed, self.perceptual, self.perceptual_weight = signed, perceptual, perceptual_weight

    def reconstruction(self, reconstruction: mx.array, target: mx.array) -> mx.array:
        """Reconstruction error per sample, including the perceptual distance. (B, ...) twice -> (B,)."""
        error = RECONSTRUCTION[self.loss_type]
        if self.signed and self.loss_type == "bce":
            values = error(reconstruction * 0.5 + 0.5, target * 0.5 + 0.5, reduction=self.reduction)
        else:
            values = error(reconstruction, target, reduction=self.reduction)
        if self.perceptual is None:
            return values
        images = [_rgb(image if self.signed else image * 2 - 1) for image in (reconstruction, target)]
        return values + self.perceptual_weight * self.perceptual(*images)

    def per_sample(
        self, recon_x: mx.array, x: mx.array, mu: mx.array, log_var: mx.array, *, beta: Number | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Total, reconstruction error and divergence per sample, (B,) each; `beta` overrides `self.beta`."""
        reconstruction = self.reconstruction(recon_x, x)
        divergence = kl(mu, log_var, free_bits=self.free_bits)
        return reconstruction + (self.beta if beta is None else beta) * divergence, reconstruction, divergence

    def __call__(
        self, recon_x: mx.array, x: mx.array, mu: mx.array, log_var: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Batch averages of `per_sample`."""
        total, reconstruction, divergence = self.per_sample(recon_x, x, mu, log_var)
        return total.mean(), reconstruction.mean(), divergence.mean()


class BetaVAELoss(VAELoss):
    """`VAELoss` with beta annealed from `beta_start` to `beta_end` in `beta_steps` steps.

    Every call counts as one step. For a beta that depends only on the step, pass `beta_at(step)` to `per_sample`.

    Args:
        annealing: "linear", or "cyclical" with a period of `beta_steps`.
        others: keyword arguments of `VAELoss`.
    """

    def __init__(
        self,
        beta_start: float = 0.0,
        beta_end: float = 4.0,
        beta_steps: int = 1000,
        loss_type: str = "mse",
        *,
        annealing: str = "linear",
        **others: Any,
    ) -> None:
        if annealing not in ANNEALING:
            raise SettingsError(f"annealing is {annealing!r}; allowed are {', '.join(ANNEALING)}")
        if not (beta_start >= 0 and beta_end >= 0 and beta_steps >= 0):
            raise SettingsError(
                f"beta_start {beta_start}, beta_end {beta_end}, beta_steps {beta_steps}: at least 0 is allowed"
            )
        self.beta_start, self.beta_end, self.beta_steps = beta_start, beta_end, beta_steps
        self.annealing, self.step = annealing, 0
        super().__init__(self.beta_at(0), loss_type, **others)

    def beta_at(self, step: int) -> float:
        """Beta at a step, counted from 0."""
        return ANNEALING[self.annealing](step, start=self.beta_start, end=self.beta_end, steps=self.beta_steps)

    def __call__(
        self, recon_x: mx.array, x: mx.array, mu: mx.array, log_var: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Batch averages with the current beta; then advance beta by one step."""
        values = super().__call__(recon_x, x, mu, log_var)
        self.step += 1
        self.beta = self.beta_at(self.step)
        return values


class DisentangledVAELoss(VAELoss):
    """The beta-TC loss: `total, reconstruction, kl, tc = loss(recon_x, x, mu, log_var, z)`, averages over the batch.

    total = reconstruction + alpha MI + beta TC + gamma dimension-wise KL. `kl` is computed in closed form. With alpha =
    beta = gamma = b, the expected total is that of `VAELoss(beta=b)`.

    Args:
        dataset_size: number of samples in the data set, for the estimates; None uses the batch size.
        sampling: see `total_correlation.log_weights`.
        others: keyword arguments of `VAELoss` except `free_bits`.
    """

    def __init__(
        self,
        beta: float = 4.0,
        gamma: float = 1.0,
        loss_type: str = "mse",
        *,
        alpha: float = 1.0,
        dataset_size: int | None = None,
        sampling: Sampling = "stratified",
        **others: Any,
    ) -> None:
        super().__init__(beta, loss_type, **others)
        if self.free_bits:
            raise SettingsError("free_bits: not supported by this loss; leave it out")
        if not (alpha >= 0 and gamma >= 0):
            raise SettingsError(f"alpha {alpha}, gamma {gamma}: at least 0 is allowed")
        log_weights(1, dataset_size or 1, sampling)  # validates `sampling`
        self.alpha, self.gamma, self.dataset_size, self.sampling = alpha, gamma, dataset_size, sampling

    def per_sample(  # type: ignore[override]
        self,
        recon_x: mx.array,
        x: mx.array,
        mu: mx.array,
        log_var: mx.array,
        z: mx.array,
        *,
        beta: Number | None = None,
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Total, reconstruction error, divergence and total correlation per sample, (B,) each."""
        reconstruction = self.reconstruction(recon_x, x)
        parts = decompose_kl(z, mu, log_var, dataset_size=self.dataset_size, sampling=self.sampling)
        weighted = (
            self.alpha * parts.mutual_information
            + (self.beta if beta is None else beta) * parts.total_correlation
            + self.gamma * parts.dimension_wise_kl
        )
        return reconstruction + weighted, reconstruction, kl(mu, log_var), parts.total_correlation

    def __call__(  # type: ignore[override]
        self, recon_x: mx.array, x: mx.array, mu: mx.array, log_var: mx.array, z: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Batch averages of `per_sample`."""
        total, reconstruction, divergence, correlation = self.per_sample(recon_x, x, mu, log_var, z)
        return total.mean(), reconstruction.mean(), divergence.mean(), correlation.mean()


def _apply_free_bits(terms: mx.array, free_bits: float) -> mx.array:
    """Replace components with a batch average below `free_bits` by that constant. (B, ...) -> (B, ...)."""
    if not free_bits:
        return terms
    return mx.where(terms.mean(axis=0, keepdims=True) > free_bits, terms, free_bits)


def _reduce(values: mx.array, reduction: Reduction) -> mx.array:
    values = _flatten(values.astype(mx.float32))
    return values.sum(axis=1) if reduction == "sum" else values.mean(axis=1)


def _flatten(values: mx.array) -> mx.array:
    return values.reshape(values.shape[0], -1)


def _rgb(image: mx.array) -> mx.array:
    """Repeat the channel of grey images (B, H, W, 1) three times."""
    return mx.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
