"""The loss on held-out images: without gradients, and with the same noise at each measurement."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from mflux_vae.runtime.threads import exclusive
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.data.batches import EncodedDataset, fixed_batch
from mflux_vae_train.dreambooth.optimization.objective import dreambooth_loss
from mflux_vae_train.pipelines.capabilities import SupportsPrediction
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.randomness import Stream, sample_keys

LEVELS, PREDICTIONS = 4, 16
"""Least number of noise levels of each image, and of predictions in a measurement."""


class HeldOutLoss:
    """Called after an update: the mean instance loss of images that are not trained.

    Each image is predicted at the same quantiles of the training's noise levels, with noise that is a function of
    (seed, level, image). So two measurements differ by the weights alone, and all processes return the number that a
    single one does.

    Args:
        dataset: the held-out images.
        sampling: how noise levels are drawn; None for the recommended scheme. A pipeline without `predict` draws them
            from the keys.
        batch_size: images predicted together. With that of training a measurement takes less memory than an update.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        dataset: EncodedDataset,
        *,
        guidance: float,
        sampling: NoiseSampling | None,
        seed: int,
        batch_size: int,
        processes: ProcessGroup = SINGLE,
    ) -> None:
        self._pipeline, self._dataset, self._processes = pipeline, dataset, processes
        self._guidance, self._seed = guidance, seed
        self._sampling: NoiseSampling | None = None
        if isinstance(pipeline, SupportsPrediction):
            self._sampling = sampling or NoiseSampling(scheme=pipeline.recommended.weighting_scheme or "uniform")
        count = len(dataset.samples)
        self._levels = max(LEVELS, -(-PREDICTIONS // count))
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, sample in enumerate(dataset.samples):
            by_shape.setdefault(dataset.latents[sample.latents[0][0]].shape, []).append(index)
        groups = [
            indices[start : start + batch_size]
            for indices in by_shape.values()
            for start in range(0, len(indices), batch_size)
        ]
        self._batches = [(level, indices) for level in range(self._levels) for indices in groups]

    def __call__(self) -> float:
        sums = [float(total) for _, (total,) in self._processes.map_in_rounds(self._batches, self._sum)]
        return sum(sums) / (self._levels * len(self._dataset.samples))

    def _sum(self, batch: tuple[int, list[int]]) -> list[mx.array]:
        """The sum of the losses of these images at a level."""
        level, indices = batch
        keys = sample_keys(self._seed, Stream.EVALUATION, level, indices)
        sampling = self._sampling and replace(self._sampling, quantile=(level + 0.5) / self._levels)
        arrays = fixed_batch(self._dataset, indices, keys)
        loss, _ = dreambooth_loss(
            self._pipeline, arrays, guidance=self._guidance, prior_loss_weight=None, sampling=sampling
        )
        total = loss * len(indices)
        with exclusive():
            mx.eval(total)
        return [total]
