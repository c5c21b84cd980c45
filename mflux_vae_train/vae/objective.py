"""What a training step makes smaller: the loss of a micro-batch, as settings ask for it, and that of the critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mflux_vae import kernels
from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.kernels.overrides import overridable
from mflux_vae.metrics.lpips import LPIPS
from mflux_vae.networks.layers import batch_statistics, fold_statistics
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae_train.distributed.watchdog import ProcessLost
from mflux_vae_train.training.step import Arrays, MicroBatch, Step
from mflux_vae_train.training.tape import Tape, value_of
from mflux_vae_train.vae.build import before_last_layer, is_flat
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.losses import adversarial
from mflux_vae_train.vae.losses.elbo import BetaVAELoss, DisentangledVAELoss, VAELoss, active_units
from mflux_vae_train.vae.network.dropout import by_keys


class Objective:
    """The loss of a micro-batch: `pixels` (B, H, W, C) in [-1, 1], `key` (B, 2), `beta` (scalar).

    Where the network ends in a sigmoid, errors are those of images in [0, 1], and otherwise of images in [-1, 1].

    Args:
        dataset_size: how many training images there are, for the estimates of total correlation.
        critic: the discriminator; its parameters come with the micro-batch, under `critic`, once it takes part.

    Raises:
        SettingsError: batches that are larger than the data set, where total correlation is estimated.
    """

    def __init__(
        self, settings: VAETrainingSettings, network: Any, *, dataset_size: int, critic: nn.Module | None = None
    ) -> None:
        self.settings, self.critic, self.dropout_keys = settings, critic, by_keys(network)
        self.signed = not (is_flat(network) and network.config.output == "sigmoid")
        common: dict[str, Any] = {
            "loss_type": settings.reconstruction_loss_type,
            "reduction": settings.reduction,
            "signed": self.signed,
            "perceptual": LPIPS.from_files(*settings.lpips) if settings.lpips else None,
            "perceptual_weight": settings.lpips_weight,
        }
        if settings.loss_type == "tc":
            if settings.batch_size > dataset_size:  # a batch stands for the data set, by weights
                raise SettingsError(
                    f"--batch_size is {settings.batch_size}; with --loss_type tc at most as many as the {dataset_size}"
                    " training images are allowed"
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
        """The weight at an update, or where it ends up (None)."""
        if not isinstance(self.criterion, BetaVAELoss):
            return float(self.criterion.beta)
        return self.criterion.beta_end if update is None else self.criterion.beta_at(update)

    def per_sample(
        self, reconstruction: mx.array, pixels: mx.array, posterior: DiagonalGaussian, z: mx.array, beta: Any
    ) -> dict[str, mx.array]:
        """`loss`, `rec`, `kl`, and `tc` where it is part of the loss, (B,) each, in nats where the error is."""
        if not self.signed:
            reconstruction, pixels = reconstruction * 0.5 + 0.5, pixels * 0.5 + 0.5
        given = (reconstruction, pixels, posterior.mean, posterior.logvar)
        if isinstance(self.criterion, DisentangledVAELoss):
            values = self.criterion.per_sample(*given, z, beta=beta)
        else:
            values = self.criterion.per_sample(*given, beta=beta)
        return dict(zip(("loss", "rec", "kl", "tc"), values, strict=False))

    def __call__(self, network: Any, arrays: Arrays) -> tuple[mx.array, Mapping[str, mx.array]]:
        """See `step.Loss`."""
        if self.settings.mixed_precision:
            network.update(tree_map(lambda weight: weight.astype(mx.bfloat16), network.trainable_parameters()))
        with self.dropout_keys.using(arrays["key"]):
            return self._computed(network, arrays)

    def gradients(
        self, network: Any, arrays: Arrays, scale: mx.array
    ) -> tuple[tuple[mx.array, Mapping[str, mx.array]], Any] | None:
        """See `step.HasGradients`; not with a critic, whose part of the loss differentiates within itself."""
        if "critic" in arrays:
            return None
        tape = Tape(network.trainable_parameters())
        with kernels.overlapping(), self.dropout_keys.using(arrays["key"]):
            posterior, z, made = self._forward(network, tape.constant(arrays["pixels"]), arrays)
            ends = posterior.mean, posterior.logvar, z, made
            values = [value_of(end) for end in ends]
            fold_statistics(network, batch_statistics(network))
            differentiated = mx.value_and_grad(partial(self._loss, arrays), argnums=range(len(ends)))
            (loss, metrics), slopes = differentiated(*values)
            gradients = tape.gradients([(end, slope * scale) for end, slope in zip(ends, slopes, strict=True)])
        return (loss, metrics), gradients

    def noise(self, arrays: Arrays, shape: Sequence[int]) -> mx.array:
        """What latents of such a shape are drawn with."""
        return standard_normal(arrays["key"], shape)

    def _forward(self, network: Any, pixels: Any, arrays: Arrays) -> tuple[Any, Any, Any]:
        """Posterior, latents and reconstruction."""
        posterior = network.encode(pixels)
        z = _reparameterize(posterior.mean, posterior.logvar, self.noise(arrays, posterior.mean.shape))
        return posterior, z, network.decode(z).astype(mx.float32)

    def _loss(
        self, arrays: Arrays, mean: mx.array, logvar: mx.array, z: mx.array, made: mx.array
    ) -> tuple[mx.array, Mapping[str, mx.array]]:
        """Of what a forward pass made."""
        posterior = DiagonalGaussian(mean, logvar)
        values = self.per_sample(made, arrays["pixels"], posterior, z, arrays["beta"])
        total = values.pop("loss").mean()
        metrics = {name: value.mean() for name, value in values.items()}
        return total, {**metrics, "active": active(posterior)}

    def _computed(self, network: Any, arrays: Arrays) -> tuple[mx.array, Mapping[str, mx.array]]:
        extra: dict[str, mx.array] = {}
        if "critic" not in arrays:
            posterior, z, made = self._forward(network, arrays["pixels"], arrays)
        else:
            posterior = network.encode(arrays["pixels"])
            z = _reparameterize(posterior.mean, posterior.logvar, self.noise(arrays, posterior.mean.shape))
            features = before_last_layer(network, z)
            made = network.decoder.conv_out(features).astype(mx.float32)
            extra = self._against(arrays, network.decoder.conv_out, features, made)
        fold_statistics(network, batch_statistics(network))
        total, metrics = self._loss(arrays, posterior.mean, posterior.logvar, z, made)
        return total + extra.get("adversarial", 0.0), {**metrics, **extra}

    def _against(self, arrays: Arrays, last: Any, features: mx.array, made: mx.array) -> dict[str, mx.array]:
        """The critic's part of the loss, as strong as the reconstruction's at the decoder's last layer."""
        critic: Any = self.critic
        critic.update(arrays["critic"])
        fixed, own = mx.stop_gradient(features), last.weight

        def remade(weight: mx.array) -> mx.array:
            last.weight = weight
            try:
                return last(fixed).astype(mx.float32)
            finally:
                last.weight = own

        weight = adversarial.adaptive_weight(
            lambda weight: self.criterion.reconstruction(remade(weight), arrays["pixels"]).mean(),
            lambda weight: adversarial.generator_loss(critic(remade(weight))).mean(),
            own,
            scale=self.settings.disc_weight,
        )
        value = weight * adversarial.generator_loss(critic(made)).mean()
        batch_statistics(critic)  # nobody wants them
        return {"adversarial": value, "adaptive_weight": weight}


def sampled(posterior: DiagonalGaussian, keys: mx.array) -> mx.array:
    """One draw for each sample of a batch, a function of its own key alone. keys (B, 2)."""
    return _reparameterize(posterior.mean, posterior.logvar, standard_normal(keys, posterior.mean.shape))


def standard_normal(keys: mx.array, shape: Sequence[int]) -> mx.array:
    """Noise of a shape (B, ...), each sample's a function of its own key alone. keys (B, 2)."""
    return mx.vmap(lambda key: mx.random.normal(shape[1:], key=key))(keys)


@overridable
def _reparameterize(mean: mx.array, logvar: mx.array, noise: mx.array) -> mx.array:
    return mean + mx.exp(0.5 * logvar) * noise


def active(posterior: DiagonalGaussian) -> mx.array:
    """Latent units in use, or channels of a spatial latent."""
    return active_units(posterior.mean.reshape(-1, posterior.mean.shape[-1])).astype(mx.float32)


class AdversarialStep:
    """A step of the network, and from update `start` on one of its critic with the network as it is then.

    Args:
        step: the network's.
        critic: the critic's, with `critic_loss`.
        start: first update in which it takes part.
    """

    def __init__(self, step: Step, critic: Step, start: int) -> None:
        self.step, self.critic, self.start = step, critic, start

    def __call__(self, update: int, batches: Sequence[MicroBatch], learning_rate: float) -> dict[str, float]:
        """See `step.Step`."""
        if not adversarial.started(update, self.start):
            return self.step(update, batches, learning_rate)
        parameters: Any = self.critic.model.trainable_parameters()
        with_critic = [MicroBatch(arrays={**b.arrays, "critic": parameters}, weight=b.weight) for b in batches]
        metrics = self.step(update, with_critic, learning_rate)
        self.critic.model.update(parameters)
        network: Any = self.step.model
        pairs = []
        for batch in batches:
            z = sampled(network.encode(batch.arrays["pixels"]), batch.arrays["key"])
            made = network.decode(z).astype(mx.float32)
            batch_statistics(network)
            pairs.append(MicroBatch(arrays={"pixels": batch.arrays["pixels"], "made": made}, weight=batch.weight))
        try:
            critic = self.critic(update, pairs, learning_rate)
        except ProcessLost as error:  # the network is an update ahead of its critic: not to be kept as a checkpoint
            raise TrainingError(str(error)) from error
        return {**metrics, "critic": critic["loss"], "critic_grad_norm": critic["grad_norm"]}


def critic_loss(critic: Any, arrays: Arrays) -> tuple[mx.array, Mapping[str, mx.array]]:
    """Of telling `pixels` from what the network `made` of them, (B, H, W, C) in [-1, 1] each; see `step.Loss`."""
    loss = adversarial.hinge_loss(critic(arrays["pixels"]), critic(arrays["made"])).mean()
    batch_statistics(critic)
    return loss, {}
