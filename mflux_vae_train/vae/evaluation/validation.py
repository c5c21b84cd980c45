"""What an autoencoder does with images that it was not trained on: numbers and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.images import grid, save_image, to_pictures, to_pixels
from mflux_vae_train.distributed.interrupts import interruptible
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.vae.build import is_flat, latent_shape
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.data.batches import Source, in_order
from mflux_vae_train.vae.losses.elbo import active_units
from mflux_vae_train.vae.losses.total_correlation import decomposition
from mflux_vae_train.vae.objective import Objective, sampled

PAIRS, SAMPLES, COLUMNS = 16, 64, 8
"""Images in the pictures."""

COLLAPSED = 1e-2
"""Nats per latent number, below which a posterior says nothing of its image."""


class Validation:
    """Measures and shows a network, which the caller has put into evaluation. Noise is the same every time.

    Args:
        folder: for the pictures.
    """

    def __init__(
        self,
        objective: Objective,
        network: Any,
        held_out: Source,
        settings: VAETrainingSettings,
        folder: Path,
        processes: ProcessGroup = SINGLE,
    ) -> None:
        self._objective, self._network, self._held_out = objective, network, held_out
        self._settings, self._folder, self._processes = settings, folder, processes

    def measured(self) -> dict[str, float]:
        """Averages over the held-out images, which several processes share out among them.

        Returns:
            `loss` with the final beta, without a discriminator's part; `rec` and `kl` of it; `psnr` (dB) of decoded
            posterior means; `active` latent units, or channels; of vector latents `tc`, the total correlation in nats.
        """
        held_out = len(self._held_out)
        sums, means = interruptible(self._processes, self._own_share)
        measured = {name: total / held_out for name, total in self._processes.all_reduce(sums).items()}
        everyones = [array for arrays in self._processes.gather_arrays(means) for array in arrays]
        return {**measured, "active": float(active_units(mx.concatenate(everyones)))}

    def _own_share(self) -> tuple[dict[str, float], list[mx.array]]:
        """Sums over the images of this process, and their posterior means, one row for each place."""
        network, size, held_out = self._network, self._settings.batch_size, len(self._held_out)
        sums: dict[str, float] = {}
        means: list[mx.array] = []
        pieces = self._processes.shard(
            [range(start, min(start + size, held_out)) for start in range(0, held_out, size)]
        )
        for piece, pictures in zip(pieces, in_order(self._held_out, pieces), strict=True):
            pixels, count = mx.array(to_pixels(pictures)), len(piece)
            posterior = network.encode(pixels)
            z = sampled(posterior, sample_keys(self._settings.seed, Stream.EVALUATION, 0, piece))
            made = network.decode(z).astype(mx.float32)
            values = self._objective.per_sample(made, pixels, posterior, z, self._objective.beta_at(None))
            error = mx.square(mx.clip(network.decode(posterior.mean).astype(mx.float32), -1, 1) - pixels)
            values["psnr"] = 10 * mx.log10(4 / mx.maximum(error.reshape(count, -1).mean(axis=1), 1e-10))
            if is_flat(network):
                parts = decomposition(z, posterior.mean, posterior.logvar, dataset_size=held_out)
                values["tc"] = parts.total_correlation
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value.sum())
            means.append(posterior.mean.reshape(-1, posterior.mean.shape[-1]))
            mx.eval(means[-1])
        return sums, means

    def pictures(self, update: int) -> dict[str, np.ndarray]:
        """Writes held-out images above their reconstructions, and images of latents from the prior; and gives them."""
        network, count = self._network, min(PAIRS, len(self._held_out))
        originals = np.stack([self._held_out.item(index) for index in range(count)])
        again = to_pictures(np.array(network.decode(network.encode(mx.array(to_pixels(originals))).mean)))
        keys = sample_keys(self._settings.seed, Stream.PREVIEW, 0, range(SAMPLES))
        shape = latent_shape(network, self._settings.image_size)
        z = mx.stack([mx.random.normal(shape, key=key) for key in keys])
        images = np.concatenate([to_pictures(np.array(network.decode(part))) for part in mx.split(z, COLUMNS)])
        made = {"reconstructions": pairs(originals, again), "samples": grid(list(images), COLUMNS)}
        for name, picture in made.items():
            save_image(self._folder / f"{name}-{update:06}.png", picture)
        return made


def collapse(metrics: Mapping[str, float], network: Any) -> str | None:
    """A sentence where the posterior has become the prior, and latents tell nothing of their images."""
    units = network.config.latent_channels
    if metrics["active"] > 0 and (not is_flat(network) or metrics["kl"] > COLLAPSED * units):
        return None
    return (
        f"posterior collapse: {metrics['active']:.0f} of {units} latent units are in use, KL is {metrics['kl']:.2g}"
        " nats; lower --beta, let it rise (--loss_type beta_vae) or give --free_bits"
    )


def pairs(originals: np.ndarray, again: np.ndarray) -> np.ndarray:
    """One picture: rows of originals, each above that of their reconstructions. uint8 (N, H, W, C) twice."""
    columns = min(COLUMNS, len(originals))
    rows: list[np.ndarray] = []
    for start in range(0, len(originals), columns):
        for part in (originals, again):
            rows += _filled(part[start : start + columns], columns)
    return grid(rows, columns)


def _filled(pictures: np.ndarray, columns: int) -> list[np.ndarray]:
    blank = np.full_like(pictures[0], 255)
    return [*pictures, *[blank] * (columns - len(pictures))]
