"""The `AutoencoderKL` training module of latent-diffusion, for custom training loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae.pretrained import loading
from mflux_vae_train.optimizers.adam import Adam
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.vae.losses.elbo import VAELoss
from mflux_vae_train.vae.objective import sample_latents

Loss: TypeAlias = Callable[..., tuple[mx.array, dict[str, mx.array]]]
"""Signature of `AutoEncoderKL.default_loss`."""

KL_WEIGHT = 0.5
"""Weight of KL, a sum over latents, relative to a mean error over pixels: KL dominates, so the posterior collapses."""


class AutoEncoderKL(nn.Module):
    """An autoencoder with loss and optimizer. Images and latents are (B, C, H, W), images in [-1, 1].

    `VAETrainer` trains the same network from settings (`network_config`, `init_from`) and should be preferred.

    Args:
        ddconfig: configuration of encoder and decoder, as in latent-diffusion.
        embed_dim: latent channels.
        lossconfig: a function like `default_loss` (default), or keyword arguments of `VAELoss`, such as
            {"beta": 1e-6, "loss_type": "l1"}.
        ckpt_path: weights file in any key naming.
        ignore_keys: prefixes of weights that are not loaded, such as "decoder".
        colorize_nlabels: number of labels in segmentation maps for `to_rgb`.
        monitor: name of a metric of `validation_step`; `best` is its smallest value.

    Attributes:
        network: the network of `mflux_vae`, with NHWC images.
        learning_rate: used by `configure_optimizers`.
        best: smallest monitored value so far, or None.

    Raises:
        SettingsError: invalid `ddconfig` or `lossconfig`.
        WeightsError: the checkpoint does not match.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        lossconfig: Mapping[str, Any] | Loss | None = None,
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        config = AutoencoderKLConfig.from_ddconfig(ddconfig, embed_dim)
        self.network = AutoencoderKL(config)
        if ckpt_path is not None:
            stored = loading.open_network(ckpt_path, mx.float32, config=config.to_dict())
            loaded = dict(tree_flatten(stored.parameters())).items()
            self.network.update(tree_unflatten([item for item in loaded if not item[0].startswith(tuple(ignore_keys))]))
        self.learning_rate, self.monitor = 4.5e-6, monitor
        self.best: float | None = None
        self._loss = lossconfig if callable(lossconfig) else self._build_loss(lossconfig)
        self._colours = colorize_nlabels and mx.random.normal((colorize_nlabels, 3), key=mx.random.key(0))

    def encode(self, x: mx.array) -> DiagonalGaussian:
        """(B, C, H, W) -> posterior of latents (B, embed_dim, h, w)."""
        posterior = self.network.encode(x.transpose(0, 2, 3, 1))
        return DiagonalGaussian(posterior.mean.transpose(0, 3, 1, 2), posterior.logvar.transpose(0, 3, 1, 2))

    def decode(self, z: mx.array) -> mx.array:
        """(B, embed_dim, h, w) -> (B, C, H, W), approximately in [-1, 1]."""
        return self.network.decode(z.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    def __call__(
        self, input: mx.array, sample_posterior: bool = True, *, keys: mx.array | None = None
    ) -> tuple[mx.array, DiagonalGaussian]:
        """Reconstruction and posterior.

        Args:
            sample_posterior: decode a sample of the posterior instead of its mean.
            keys: random keys of the samples, (B, 2); None uses MLX's global state.
        """
        posterior = self.encode(input)
        if not sample_posterior:
            return self.decode(posterior.mode()), posterior
        return self.decode(posterior.sample() if keys is None else sample_latents(posterior, keys)), posterior

    forward = __call__

    def get_last_layer(self) -> mx.array:
        """Weight of the decoder's last layer, for balancing the gradients of an adversarial loss."""
        weight: mx.array = self.network.decoder.conv_out.weight
        return weight

    def default_loss(
        self,
        inputs: mx.array,
        reconstructions: mx.array,
        posterior: DiagonalGaussian,
        global_step: int = 0,
        last_layer: mx.array | None = None,
        split: str = "train",
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Mean squared error + 0.5 KL, and metrics. The posterior collapses with this loss: see `KL_WEIGHT`."""
        error, divergence = mx.square(reconstructions - inputs).mean(), posterior.kl().mean()
        return self._with_log(error + KL_WEIGHT * divergence, error, divergence, split)

    def training_step(self, batch: mx.array, batch_idx: int) -> mx.array:
        """Loss of a batch for differentiation; its noise is a function of `batch_idx`."""
        return self._step_loss(batch, batch_idx, Stream.NOISE, "train")[0]

    def validation_step(self, batch: mx.array, batch_idx: int) -> dict[str, mx.array]:
        """Metrics of a batch: `val/total_loss`, `val/rec_loss`, `val/kl_loss`."""
        metrics = self._step_loss(batch, batch_idx, Stream.EVALUATION, "val")[1]
        if self.monitor is not None:
            value = float(metrics[self.monitor])
            self.best = value if self.best is None else min(self.best, value)
        return metrics

    def configure_optimizers(self) -> Adam:
        """Adam with beta1 0.5 and beta2 0.9, as in latent-diffusion."""
        return Adam(beta1=0.5, beta2=0.9, learning_rate=self.learning_rate)

    def to_rgb(self, x: mx.array) -> mx.array:
        """Segmentation maps (B, labels, H, W) -> (B, 3, H, W) in [-1, 1], one random colour per label."""
        colours: Any = self._colours
        rgb = mx.tensordot(x.transpose(0, 2, 3, 1), colours, axes=1).transpose(0, 3, 1, 2)
        return 2 * (rgb - rgb.min()) / mx.maximum(rgb.max() - rgb.min(), 1e-12) - 1

    def _step_loss(
        self, batch: mx.array, index: int, stream: Stream, split: str
    ) -> tuple[mx.array, dict[str, mx.array]]:
        reconstruction, posterior = self(batch, keys=sample_keys(0, stream, index, range(len(batch))))
        return self._loss(batch, reconstruction, posterior, index, last_layer=self.get_last_layer(), split=split)

    def _build_loss(self, lossconfig: Mapping[str, Any] | None) -> Loss:
        if lossconfig is None:
            return self.default_loss
        criterion = VAELoss(**{"signed": True, **lossconfig})

        def loss(
            inputs: mx.array, outputs: mx.array, posterior: DiagonalGaussian, _: int, *, split: str, **others: Any
        ) -> tuple[mx.array, dict[str, mx.array]]:
            images = (outputs.transpose(0, 2, 3, 1), inputs.transpose(0, 2, 3, 1))
            return self._with_log(*criterion(*images, posterior.mean, posterior.logvar), split)

        return loss

    @staticmethod
    def _with_log(
        total: mx.array, error: mx.array, divergence: mx.array, split: str
    ) -> tuple[mx.array, dict[str, mx.array]]:
        metrics = {"total_loss": total, "rec_loss": error, "kl_loss": divergence}
        return total, {f"{split}/{name}": mx.stop_gradient(value) for name, value in metrics.items()}
