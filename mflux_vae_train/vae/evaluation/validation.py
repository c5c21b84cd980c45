"""Validation on held-out images: metrics and previews."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import DeviceError, RunError
from mflux_vae.images import grid, save_image, to_pictures, to_pixels
from mflux_vae.runtime import device
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae.utils.arrays import check_decoded
from mflux_vae.utils.formatting import first_few
from mflux_vae_train.distributed.interrupts import interruptible
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.vae.build import has_vector_latents, latent_shape
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.data.batches import Source, prefetch_batches
from mflux_vae_train.vae.losses.elbo import active_units
from mflux_vae_train.vae.losses.total_correlation import decompose_kl
from mflux_vae_train.vae.objective import Objective, sample_latents

logger = logging.getLogger(__name__)

PAIRS, SAMPLES, COLUMNS = 16, 64, 8
"""Numbers of images in the previews."""

COLLAPSE_KL = 1e-2
"""KL (nats) per latent dimension below which the posterior has collapsed."""


class Validation:
    """Validate a network in evaluation mode. Every validation uses the same noise.

    Args:
        folder: folder of the previews.
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

    def measure(self) -> dict[str, float]:
        """Averages over the held-out images, computed by all processes together.

        Returns:
            `loss` with the final beta, without the adversarial loss, and its terms `rec` and `kl`; `psnr` (dB) of
            decoded posterior means; `active` dimensions or channels; for vector latents `tc`, total correlation (nats).
        """
        held_out = len(self._held_out)
        sums, means, broken = interruptible(self._processes, self._local_sums)
        if indices := sorted(index for each in self._processes.gather(broken) for index in each):
            logger.warning("held-out images with a loss that is not finite: %s", first_few(list(map(str, indices))))
        measured = {name: total / held_out for name, total in self._processes.all_reduce(sums).items()}
        all_means = [array for arrays in self._processes.gather_arrays(means) for array in arrays]
        return {**measured, "active": float(active_units(mx.concatenate(all_means)))}

    def _local_sums(self) -> tuple[dict[str, float], list[mx.array], list[int]]:
        """Sums of metrics over the images of this process, posterior means (one row per spatial position), and indices
        of images whose loss is not finite."""
        network, size, held_out = self._network, self._settings.batch_size, len(self._held_out)
        sums: dict[str, float] = {}
        means: list[mx.array] = []
        broken: list[int] = []
        pieces = self._processes.shard(
            [range(start, min(start + size, held_out)) for start in range(0, held_out, size)]
        )
        for piece, pictures in zip(pieces, prefetch_batches(self._held_out, pieces), strict=True):
            pixels, count = mx.array(to_pixels(pictures)), len(piece)
            posterior = network.encode(pixels)
            z = sample_latents(posterior, sample_keys(self._settings.seed, Stream.EVALUATION, 0, piece))
            reconstruction = network.decode(z).astype(mx.float32)
            values = self._objective.per_sample(reconstruction, pixels, posterior, z, self._objective.beta_at(None))
            error = mx.square(mx.clip(network.decode(posterior.mean).astype(mx.float32), -1, 1) - pixels)
            values["psnr"] = 10 * mx.log10(4 / mx.maximum(error.reshape(count, -1).mean(axis=1), 1e-10))
            if has_vector_latents(network):
                parts = decompose_kl(z, posterior.mean, posterior.logvar, dataset_size=held_out)
                values["tc"] = parts.total_correlation
            infinite = np.flatnonzero(~np.isfinite(np.array(values["loss"])))
            broken += [piece[int(index)] for index in infinite]
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value.sum())
            means.append(posterior.mean.reshape(-1, posterior.mean.shape[-1]))
            mx.eval(means[-1])
        return sums, means, broken

    def draw(self, update: int) -> dict[str, np.ndarray]:
        """Write and return pictures of held-out images above their reconstructions, and of random samples.

        Returns:
            nothing if the device fails or an image has NaN values; a warning says so.

        Raises:
            DeviceError: the CUDA device failed; its memory may hold anything then.
        """
        try:
            with device_errors("draw them less often by a larger --samples_every"):
                return self._draw(update)
        except RunError as error:
            if isinstance(error, DeviceError) and device.kind() == "cuda":
                raise
            device.release_arrays(error)
            logger.warning("previews after update %d failed: %s", update, error)
        return {}

    def _draw(self, update: int) -> dict[str, np.ndarray]:
        network, count = self._network, min(PAIRS, len(self._held_out))
        originals = np.stack([self._held_out.item(index) for index in range(count)])
        reconstructions = _pictures(
            network.decode(network.encode(mx.array(to_pixels(originals))).mean), "reconstruction of held-out image"
        )
        keys = sample_keys(self._settings.seed, Stream.PREVIEW, 0, range(SAMPLES))
        shape = latent_shape(network, self._settings.image_size)
        z = mx.stack([mx.random.normal(shape, key=key) for key in keys])
        images = np.concatenate([_pictures(network.decode(part), "sample") for part in mx.split(z, COLUMNS)])
        previews = {
            "reconstructions": comparison_grid(originals, reconstructions),
            "samples": grid(list(images), COLUMNS),
        }
        for name, picture in previews.items():
            save_image(self._folder / f"{name}-{update:06}.png", picture)
        return previews


def _pictures(pixels: mx.array, what: str) -> np.ndarray:
    """(N, H, W, C) in [-1, 1] -> uint8; errors of `check_decoded`."""
    check_decoded(pixels, what)
    return to_pictures(np.array(pixels))


def collapse_warning(metrics: Mapping[str, float], network: Any) -> str | None:
    """A warning if the posterior has collapsed to the prior, or None."""
    units = network.config.latent_channels
    if metrics["active"] > 0 and (not has_vector_latents(network) or metrics["kl"] > COLLAPSE_KL * units):
        return None
    return (
        f"posterior collapse: {metrics['active']:.0f} of {units} latent units are active, KL is {metrics['kl']:.2g}"
        " nats; lower --beta, anneal it (--loss_type beta_vae) or use --free_bits"
    )


def comparison_grid(originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Rows of originals, each above the row of their reconstructions. uint8 (N, H, W, C) twice -> (H, W, C)."""
    columns = min(COLUMNS, len(originals))
    rows: list[np.ndarray] = []
    for start in range(0, len(originals), columns):
        for part in (originals, reconstructions):
            rows += _pad_row(part[start : start + columns], columns)
    return grid(rows, columns)


def _pad_row(pictures: np.ndarray, columns: int) -> list[np.ndarray]:
    blank = np.full_like(pictures[0], 255)
    return [*pictures, *[blank] * (columns - len(pictures))]
