"""Previews: pictures of the validation prompts at fixed seeds, as the pipeline is now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mflux_vae.images import grid, load_image, save_image
from mflux_vae_train.dreambooth import overview
from mflux_vae_train.dreambooth.choices import Choices
from mflux_vae_train.dreambooth.encoding import pictures_at_once
from mflux_vae_train.dreambooth.prior import sampled
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.trackers import Tracker

logger = logging.getLogger(__name__)


class Previews:
    """Called with the number of updates made; writes a row of pictures for each prompt, and the overview so far.

    Picture i of a prompt starts from the same noise every time, so that previews differ by what was learnt alone.
    Whatever goes wrong is said and does not end the run.

    Args:
        conditioning: of each validation prompt, one row.
        instance: files of the instance pictures, for the overview.
        samples: folder to write to.
        trackers: what else is shown the pictures.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        conditioning: Sequence[Conditioning],
        choices: Choices,
        *,
        instance: Sequence[Path],
        samples: Path,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._pipeline, self._conditioning, self._choices = pipeline, conditioning, choices
        self._samples, self._trackers = samples, trackers
        few = instance[: overview.shown(choices.settings.num_validation_images)]  # kept: files may go during a run
        self._instance = [load_image(path, resolution=choices.resolution) for path in few]

    def __call__(self, updates: int) -> None:
        count = self._choices.settings.num_validation_images
        if not count:
            return
        try:
            rows = [self._pictures(conditioning, count) for conditioning in self._conditioning]
            sheet = grid([picture for row in rows for picture in row], count, gap=0)
            save_image(overview.preview_file(self._samples, updates), sheet)
            overview.write_progress(self._samples, self._instance, columns=count)
            for prompt, row in zip(self._choices.validation_prompt, rows, strict=True):
                for tracker in self._trackers:
                    tracker.picture("preview", updates, grid(row, count), prompt)
        except Exception as error:  # a pipeline or a disk may fail in any way; hours of training must not be lost
            logger.warning("preview after update %d failed (%s: %s)", updates, type(error).__name__, error)
        mx.clear_cache()

    def _pictures(self, conditioning: Conditioning, count: int) -> list[np.ndarray]:
        choices, size = self._choices, pictures_at_once(self._choices.resolution)
        pictures: list[np.ndarray] = []
        for start in range(0, count, size):
            members = range(start, min(start + size, count))
            pictures += sampled(
                self._pipeline,
                conditioning,
                sample_keys(choices.settings.seed, Stream.PREVIEW, 0, members),
                resolution=choices.resolution,
                guidance=choices.guidance,
            )
        return pictures
