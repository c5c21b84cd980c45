"""Objectives of a training step: the loss of the autoencoder and the loss of the discriminator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mflux_vae.errors import DeviceError, SettingsError, TrainingError
from mflux_vae.kernels.overrides import overridable
from mflux_vae.metrics.lpips import LPIPS
from mflux_vae.networks.layers import batch_statistics, fold_statistics
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae_train.distributed.watchdog import ProcessLost
from mflux_vae_train.training.step import Arrays, MicroBatch, Step, UpdateFailed
from mflux_vae_train.vae.build import has_vector_latents, penultimate_features
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.losses import adversarial
from mflux_vae_train.vae.losses.elbo import BetaVAELoss, DisentangledVAELoss, VAELoss, active_units
from mflux_vae_train.vae.network.dropout import use_keyed_dropout


class Objective:
    """The loss of a micro-batch: `pixels` (B, H, W, C) in [-1, 1], `key` (B, 2), `beta` (scalar).

    Errors are computed in [0, 1] if the network ends in a sigmoid, otherwise in [-1, 1].

    Args:
        dataset_size: number of training images, for the estimate of total correlation.
        discriminator: evaluated with the parameters in `arrays["discriminator"]`, if a micro-batch has them.

    Raises:
        SettingsError: loss_type "tc" with batches larger than the data set.
    """

    def __init__(
        self, settings: VAETrainingSettings, network: Any, *, dataset_size: int, discriminator: nn.Module | None = None
    ) -> None:
        self.settings, self.discriminator, self.dropout_keys = settings, discriminator, use_keyed_dropout(network)
        self.signed = not (has_vector_latents(network) and network.config.output == "sigmoid")
        common: dict[str, Any] = {
            "loss_type": settings.reconstruction_loss_type,
            "reduction": settings.reduction,
            "signed": self.signed,
            "perceptual": LPIPS.from_files(*settings.lpips) if settings.lpips else None,
            "perceptual_weight": settings.lpips_weight,
        }
        if settings.loss_type == "tc":
            if settings.batch_size > dataset_size:
                raise SettingsError(
                    f"--batch_size is {settings.batch_size}; with --loss_type tc at most {dataset_size}, the number of"
                    " training images, is allowed"
                )
            self.criterion: Any = DisentangledVAELoss(
                settings.beta, settings.gamma, dataset_size=dataset_size, **common
            )
        elif settings.loss_type == "beta_vae":
            self.criterion = BetaVAELoss(
                settings.beta_start,
                settings.beta_end,
                settings.beta_steps,
                annealing="cyclical" if settings.beta_cyclical else "linear",
                free_bits=settings.free_bits,
                **common,
            )
        else:
            self.criterion = VAELoss(settings.beta, free_bits=settings.free_bits, **common)

    def beta_at(self, update: int | None) -> float:
        """The weight at an update, or the final weight (None)."""
        if not isinstance(self.criterion, BetaVAELoss):
            return float(self.criterion.beta)
        return self.criterion.beta_end if update is None else self.criterion.beta_at(update)

    def per_sample(
        self, reconstruction: mx.array, pixels: mx.array, posterior: DiagonalGaussian, z: mx.array, beta: Any
    ) -> dict[str, mx.array]:
        """`loss`, `rec`, `kl` and, with loss_type "tc", `tc`; (B,) each, KL and TC in nats."""
        if not self.signed:
            reconstruction, pixels = reconstruction * 0.5 + 0.5, pixels * 0.5 + 0.5
        inputs = (reconstruction, pixels, posterior.mean, posterior.logvar)
        if isinstance(self.criterion, DisentangledVAELoss):
            values = self.criterion.per_sample(*inputs, z, beta=beta)
        else:
            values = self.criterion.per_sample(*inputs, beta=beta)
        return dict(zip(("loss", "rec", "kl", "tc"), values, strict=False))

    def __call__(self, network: Any, arrays: Arrays) -> tuple[mx.array, Mapping[str, mx.array]]:
        """See `step.Loss`."""
        if self.settings.mixed_precision:
            network.update(tree_map(lambda weight: weight.astype(mx.bfloat16), network.trainable_parameters()))
        with self.dropout_keys.using(arrays["key"]):
            return self._loss_and_metrics(network, arrays)

    def noise(self, arrays: Arrays, shape: Sequence[int]) -> mx.array:
        """Standard normal noise for latents of shape (B, ...)."""
        return standard_normal(arrays["key"], shape)

    def _forward(self, network: Any, pixels: Any, arrays: Arrays) -> tuple[Any, Any, Any]:
        """Return posterior, latents and reconstruction."""
        posterior = network.encode(pixels)
        z = _reparameterize(posterior.mean, posterior.logvar, self.noise(arrays, posterior.mean.shape))
        return posterior, z, network.decode(z).astype(mx.float32)

    def _loss(
        self, arrays: Arrays, mean: mx.array, logvar: mx.array, z: mx.array, reconstruction: mx.array
    ) -> tuple[mx.array, Mapping[str, mx.array]]:
        """Loss and metrics from the outputs of a forward pass."""
        posterior = DiagonalGaussian(mean, logvar)
        values = self.per_sample(reconstruction, arrays["pixels"], posterior, z, arrays["beta"])
        total = values.pop("loss").mean()
        metrics = {name: value.mean() for name, value in values.items()}
        return total, {**metrics, "active": active_latents(posterior)}

    def _loss_and_metrics(self, network: Any, arrays: Arrays) -> tuple[mx.array, Mapping[str, mx.array]]:
        extra: dict[str, mx.array] = {}
        if "discriminator" not in arrays:
            posterior, z, reconstruction = self._forward(network, arrays["pixels"], arrays)
        else:
            posterior = network.encode(arrays["pixels"])
            z = _reparameterize(posterior.mean, posterior.logvar, self.noise(arrays, posterior.mean.shape))
            features = penultimate_features(network, z)
            reconstruction = network.decoder.conv_out(features).astype(mx.float32)
            extra = self._adversarial(arrays, network.decoder.conv_out, features, reconstruction)
        fold_statistics(network, batch_statistics(network))
        total, metrics = self._loss(arrays, posterior.mean, posterior.logvar, z, reconstruction)
        return total + extra.get("adversarial", 0.0), {**metrics, **extra}

    def _adversarial(
        self, arrays: Arrays, last: Any, features: mx.array, reconstruction: mx.array
    ) -> dict[str, mx.array]:
        """Adversarial loss, weighted so that its gradient at the decoder's last layer matches the reconstruction's."""
        discriminator: Any = self.discriminator
        discriminator.update(arrays["discriminator"])
        fixed, last_weight = mx.stop_gradient(features), last.weight

        def decode_with(weight: mx.array) -> mx.array:
            last.weight = weight
            try:
                return last(fixed).astype(mx.float32)
            finally:
                last.weight = last_weight

        weight = adversarial.adaptive_weight(
            lambda weight: self.criterion.reconstruction(decode_with(weight), arrays["pixels"]).mean(),
            lambda weight: adversarial.generator_loss(discriminator(decode_with(weight))).mean(),
            last_weight,
            scale=self.settings.disc_weight,
        )
        value = weight * adversarial.generator_loss(discriminator(reconstruction)).mean()
        batch_statistics(discriminator)  # discard them
        return {"adversarial": value, "adaptive_weight": weight}


def sample_latents(posterior: DiagonalGaussian, keys: mx.array) -> mx.array:
    """One draw per posterior of a batch, each a function of its key. keys (B, 2) -> like `posterior.mean`."""
    return _reparameterize(posterior.mean, posterior.logvar, standard_normal(keys, posterior.mean.shape))


def standard_normal(keys: mx.array, shape: Sequence[int]) -> mx.array:
    """Noise of shape (B, ...); each sample is a function of its key. keys (B, 2)."""
    return mx.vmap(lambda key: mx.random.normal(shape[1:], key=key))(keys)


@overridable
def _reparameterize(mean: mx.array, logvar: mx.array, noise: mx.array) -> mx.array:
    return mean + mx.exp(0.5 * logvar) * noise


def active_latents(posterior: DiagonalGaussian) -> mx.array:
    """Number of active latent dimensions, or channels of a spatial latent."""
    return active_units(posterior.mean.reshape(-1, posterior.mean.shape[-1])).astype(mx.float32)


class AdversarialStep:
    """A step of the network and, from update `start` on, a step of the discriminator on the updated network.

    Args:
        step: updates the network.
        discriminator: updates the discriminator with `discriminator_loss`.
        start: first update with the discriminator.
    """

    def __init__(self, step: Step, discriminator: Step, start: int) -> None:
        self.step, self.discriminator, self.start = step, discriminator, start

    def __call__(self, update: int, batches: Sequence[MicroBatch], learning_rate: float) -> dict[str, float]:
        """See `step.Step`."""
        if not adversarial.started(update, self.start):
            return self.step(update, batches, learning_rate)
        parameters: Any = self.discriminator.model.trainable_parameters()
        adversarial_batches = [
            MicroBatch(arrays={**b.arrays, "discriminator": parameters}, weight=b.weight) for b in batches
        ]
        try:
            metrics = self.step(update, adversarial_batches, learning_rate)
        finally:  # differentiation leaves placeholders in the discriminator
            self.discriminator.model.update(parameters)
        try:
            with device_errors():
                other = self.discriminator(update, self._inputs(batches), learning_rate)
        except ProcessLost as error:  # the network is one update ahead: this state must not become a checkpoint
            raise TrainingError(str(error)) from error
        except DeviceError as error:
            raise UpdateFailed(**error.parts, memory=error.memory) from error
        return {**metrics, **{f"discriminator_{name}": other[name] for name in ("loss", "grad_norm")}}

    def _inputs(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Pixels and their reconstructions by the updated network, lazy."""
        network: Any = self.step.model
        inputs = []
        for batch in batches:
            z = sample_latents(network.encode(batch.arrays["pixels"]), batch.arrays["key"])
            reconstruction = network.decode(z).astype(mx.float32)
            batch_statistics(network)
            arrays = {"pixels": batch.arrays["pixels"], "reconstruction": reconstruction}
            inputs.append(MicroBatch(arrays=arrays, weight=batch.weight))
        return inputs


def discriminator_loss(discriminator: Any, arrays: Arrays) -> tuple[mx.array, Mapping[str, mx.array]]:
    """Hinge loss for telling `pixels` from `reconstruction`, (B, H, W, C) in [-1, 1] each; see `step.Loss`."""
    loss = adversarial.hinge_loss(discriminator(arrays["pixels"]), discriminator(arrays["reconstruction"])).mean()
    batch_statistics(discriminator)
    return loss, {}
