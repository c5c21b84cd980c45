"""What an autoencoder is trained for: reconstruction, divergence from the prior, and the parts of that divergence.

Functions return one value per sample, (B,): means and weights are taken outside, in the classes below or in a training
step. Images are (B, ...) in any layout, latents (B, D) or (B, h, w, D) with independent components. Logarithms are
natural.

    total = reconstruction + beta KL                                        VAELoss (Kingma and Welling 2014)
    the same with a beta that grows                                         BetaVAELoss (Higgins et al. 2017)
    total = reconstruction + alpha MI + beta TC + gamma dimension-wise KL   DisentangledVAELoss (Chen et al. 2018)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import mlx.core as mx

from mflux_vae.errors import SettingsError
from mflux_vae_train.vae.losses.total_correlation import Sampling, decomposition, log_weights

Number: TypeAlias = "float | mx.array"
Reduction: TypeAlias = Literal["sum", "mean"]
Distance: TypeAlias = Callable[[mx.array, mx.array], mx.array]
"""(reconstruction, target), both (B, ...) -> (B,)."""


def mse(reconstruction: mx.array, target: mx.array, *, reduction: Reduction = "sum") -> mx.array:
    """Squared error over each sample's values. (B, ...) twice -> (B,)."""
    return _reduced(mx.square(reconstruction - target), reduction)


def l1(reconstruction: mx.array, target: mx.array, *, reduction: Reduction = "sum") -> mx.array:
    """Absolute error over each sample's values. (B, ...) twice -> (B,)."""
    return _reduced(mx.abs(reconstruction - target), reduction)


def bce(reconstruction: mx.array, target: mx.array, *, reduction: Reduction = "sum") -> mx.array:
    """Binary cross entropy of probabilities, both in [0, 1]. (B, ...) twice -> (B,).

    Reconstructions are kept 1e-7 away from 0 and 1, so that one wrong pixel counts 16 nats at most.
    """
    p = mx.clip(reconstruction.astype(mx.float32), 1e-7, 1 - 1e-7)
    return _reduced(-(target * mx.log(p) + (1 - target) * mx.log(1 - p)), reduction)


RECONSTRUCTION: dict[str, Callable[..., mx.array]] = {"mse": mse, "l1": l1, "bce": bce}
"""By the name in settings."""


def kl(mean: mx.array, logvar: mx.array, *, free_bits: float = 0.0) -> mx.array:
    """Kullback-Leibler divergence from the standard normal in nats. (B, ...) twice -> (B,).

    Args:
        free_bits: nats that each component has for nothing on the batch's average (Kingma et al. 2016, lambda): one
            with less counts so many, and has no gradient.
    """
    return _flat(_spared(kl_terms(mean, logvar), free_bits)).sum(axis=1)


def kl_terms(mean: mx.array, logvar: mx.array) -> mx.array:
    """The same of each component, in the shape of `mean`: for free bits, and to count latents that are in use."""
    mean, logvar = mean.astype(mx.float32), logvar.astype(mx.float32)
    return 0.5 * (mx.square(mean) + mx.exp(logvar) - 1 - logvar)


def active_units(mean: mx.array, *, threshold: float = 0.01) -> mx.array:
    """How many components of the mean vary over the samples by more than `threshold` (Burda et al. 2016). (B, D)."""
    return (mx.var(_flat(mean), axis=0) > threshold).sum()


def linear_beta(step: int, *, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps`, and `end` from there on."""
    return end if step >= steps else start + (end - start) * step / steps


def cyclical_beta(step: int, *, start: float, end: float, steps: int, rising: float = 0.5) -> float:
    """Linear from `start` to `end` in the first share `rising` of every `steps` steps, then `end` (Fu et al. 2019)."""
    return linear_beta(step % max(steps, 1), start=start, end=end, steps=max(round(rising * steps), 1))


ANNEALING: dict[str, Callable[..., float]] = {"linear": linear_beta, "cyclical": cyclical_beta}
"""By the name in settings."""


class VAELoss:
    """Reconstruction + beta KL: `total, reconstruction, kl = loss(recon_x, x, mu, log_var)`, averages over the batch.

    Args:
        beta: weight of the divergence.
        loss_type: "mse", "l1" or "bce".
        reduction: of a sample's reconstruction error: "sum" over its values, which makes beta 1 the evidence bound, or
            "mean", which makes a beta of 1 weigh as much as that of `number of values` does there.
        free_bits: see `kl`.
        signed: images are in [-1, 1] and not in [0, 1].
        perceptual: a distance of images in [-1, 1] such as `mflux_vae.metrics.lpips.LPIPS`, added to the reconstruction
            error.
        perceptual_weight: its weight.

    Raises:
        SettingsError: another loss_type or reduction, a negative weight.
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
            raise SettingsError(f"loss_type is {', '.join(RECONSTRUCTION)}, not {loss_type!r}")
        if reduction not in ("sum", "mean"):
            raise SettingsError(f"reduction is sum or mean, not {reduction!r}")
        for name, value in (("beta", beta), ("free_bits", free_bits), ("perceptual_weight", perceptual_weight)):
            if not value >= 0:
                raise SettingsError(f"{name} must not be negative, is {value}")
        self.beta, self.loss_type, self.reduction, self.free_bits = beta, loss_type, reduction, free_bits
        self.signed, self.perceptual, self.perceptual_weight = signed, perceptual, perceptual_weight

    def reconstruction(self, reconstruction: mx.array, target: mx.array) -> mx.array:
        """Error of each sample, perceptual distance included, (B,)."""
        error = RECONSTRUCTION[self.loss_type]
        if self.signed and self.loss_type == "bce":
            values = error(reconstruction * 0.5 + 0.5, target * 0.5 + 0.5, reduction=self.reduction)
        else:
            values = error(reconstruction, target, reduction=self.reduction)
        if self.perceptual is None:
            return values
        pictures = [_rgb(image if self.signed else image * 2 - 1) for image in (reconstruction, target)]
        return values + self.perceptual_weight * self.perceptual(pictures[0], pictures[1])

    def per_sample(
        self, recon_x: mx.array, x: mx.array, mu: mx.array, log_var: mx.array, *, beta: Number | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Total, reconstruction and divergence of each sample, (B,) each; `beta` replaces the loss's own."""
        reconstruction = self.reconstruction(recon_x, x)
        divergence = kl(mu, log_var, free_bits=self.free_bits)
        return reconstruction + (self.beta if beta is None else beta) * divergence, reconstruction, divergence

    def __call__(
        self, recon_x: mx.array, x: mx.array, mu: mx.array, log_var: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Averages over the batch of what `per_sample` gives."""
        total, reconstruction, divergence = self.per_sample(recon_x, x, mu, log_var)
        return total.mean(), reconstruction.mean(), divergence.mean()


class BetaVAELoss(VAELoss):
    """`VAELoss` with a beta that goes from `beta_start` to `beta_end` in `beta_steps` steps.

    Every call counts as one step and moves `beta`; where that must not depend on how often it was called, as in a
    training that may be resumed, give `per_sample` the `beta` of `beta_at`.

    Args:
        annealing: "linear", or "cyclical" with a period of `beta_steps`.
        others: what `VAELoss` takes by keyword.
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
            raise SettingsError(f"annealing is {', '.join(ANNEALING)}, not {annealing!r}")
        if not (beta_start >= 0 and beta_end >= 0 and beta_steps >= 0):
            raise SettingsError(f"beta_start {beta_start}, beta_end {beta_end}, beta_steps {beta_steps}: none below 0")
        self.beta_start, self.beta_end, self.beta_steps = beta_start, beta_end, beta_steps
        self.annealing, self.step = annealing, 0
        super().__init__(self.beta_at(0), loss_type, **others)

    def beta_at(self, step: int) -> float:
        """The weight in step number `step`, 0-based."""
        return ANNEALING[self.annealing](step, start=self.beta_start, end=self.beta_end, steps=self.beta_steps)

    def __call__(
        self, recon_x: mx.array, x: mx.array, mu: mx.array, log_var: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Averages over the batch with the `beta` of this step; the next call has the next step's."""
        values = super().__call__(recon_x, x, mu, log_var)
        self.step += 1
        self.beta = self.beta_at(self.step)
        return values


class DisentangledVAELoss(VAELoss):
    """The beta-TC loss: `total, reconstruction, kl, tc = loss(recon_x, x, mu, log_var, z)`, averages over the batch.

    total = reconstruction + alpha MI + beta TC + gamma dimension-wise KL; `kl` is the divergence itself, in closed
    form. With all three weights b the total is, on average over the draws, that of `VAELoss(beta=b)`.

    Args:
        dataset_size: how many samples the data set has, for the estimates; None takes each batch for all of it.
        sampling: see `total_correlation.log_weights`.
        others: what `VAELoss` takes by keyword, but for `free_bits`: the parts are no sums over components.
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
            raise SettingsError("free_bits is for losses of the divergence itself, not of its parts")
        if not (alpha >= 0 and gamma >= 0):
            raise SettingsError(f"alpha {alpha} and gamma {gamma} must not be negative")
        log_weights(1, dataset_size or 1, sampling)  # refuses another kind of sampling
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
        """Total, reconstruction, divergence and total correlation of each sample, (B,) each."""
        reconstruction = self.reconstruction(recon_x, x)
        parts = decomposition(z, mu, log_var, dataset_size=self.dataset_size, sampling=self.sampling)
        weighted = (
            self.alpha * parts.mutual_information
            + (self.beta if beta is None else beta) * parts.total_correlation
            + self.gamma * parts.dimension_wise_kl
        )
        return reconstruction + weighted, reconstruction, kl(mu, log_var), parts.total_correlation

    def __call__(  # type: ignore[override]
        self, recon_x: mx.array, x: mx.array, mu: mx.array, log_var: mx.array, z: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Averages over the batch of what `per_sample` gives."""
        total, reconstruction, divergence, correlation = self.per_sample(recon_x, x, mu, log_var, z)
        return total.mean(), reconstruction.mean(), divergence.mean(), correlation.mean()


def _spared(terms: mx.array, free_bits: float) -> mx.array:
    """(B, ...) with the components whose average over the batch is below `free_bits` at that, without gradients."""
    if not free_bits:
        return terms
    return mx.where(terms.mean(axis=0, keepdims=True) > free_bits, terms, free_bits)


def _reduced(values: mx.array, reduction: Reduction) -> mx.array:
    values = _flat(values.astype(mx.float32))
    return values.sum(axis=1) if reduction == "sum" else values.mean(axis=1)


def _flat(values: mx.array) -> mx.array:
    return values.reshape(values.shape[0], -1)


def _rgb(image: mx.array) -> mx.array:
    """(B, H, W, 1) with its channel three times; others as they are."""
    return mx.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
