"""Previews: pictures of the validation prompt at fixed seeds, as the pipeline is now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mflux_vae.images import save_image, strip
from mflux_vae_train.dreambooth import report
from mflux_vae_train.dreambooth.choices import Choices
from mflux_vae_train.dreambooth.data import pictures_at_once
from mflux_vae_train.dreambooth.prior import sampled
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline
from mflux_vae_train.randomness import Stream, sample_keys

logger = logging.getLogger(__name__)


class Previews:
    """Called with the number of updates made; writes one row of pictures and the overview of all rows so far.

    Picture i starts from the same noise every time, so that rows differ by what was learnt alone. Whatever
    goes wrong is said and does not end the run.

    Args:
        conditioning: one row, the validation prompt's.
        instance: the instance pictures, for the overview.
        samples: folder to write to.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        conditioning: Conditioning,
        choices: Choices,
        *,
        instance: Sequence[np.ndarray],
        samples: Path,
    ) -> None:
        self._pipeline, self._conditioning, self._choices = pipeline, conditioning, choices
        self._instance, self._samples = instance, samples

    def __call__(self, updates: int) -> None:
        count = self._choices.settings.num_validation_images
        if not count:
            return
        try:
            save_image(report.preview_file(self._samples, updates), strip(self._pictures(count)))
            report.write_progress(self._samples, self._instance, columns=count)
        except Exception as error:  # a pipeline or a disk may fail in any way; hours of training must not be lost
            logger.warning("preview after update %d failed (%s: %s)", updates, type(error).__name__, error)
        mx.clear_cache()

    def _pictures(self, count: int) -> list[np.ndarray]:
        choices, size = self._choices, pictures_at_once(self._choices.resolution)
        pictures: list[np.ndarray] = []
        for start in range(0, count, size):
            members = range(start, min(start + size, count))
            pictures += sampled(
                self._pipeline,
                self._conditioning,
                sample_keys(choices.settings.seed, Stream.PREVIEW, 0, members),
                resolution=choices.resolution,
                guidance=choices.guidance,
            )
        return pictures
