"""Previews: pictures of the validation prompts at fixed seeds, as the pipeline is now."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import RunError
from mflux_vae.images import grid, load_image, save_image
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.distributed.watchdog import ProcessLost
from mflux_vae_train.dreambooth.data.class_images import sample_images
from mflux_vae_train.dreambooth.data.encoding import images_per_batch
from mflux_vae_train.dreambooth.pipeline_features import release
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.dreambooth.reporting import preview_grid
from mflux_vae_train.monitoring.trackers import Tracker
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline
from mflux_vae_train.randomness import Stream, sample_keys

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
        processes: the processes that share out the pictures; the first one writes.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        conditioning: Sequence[Conditioning],
        choices: ResolvedSettings,
        *,
        instance: Sequence[Path],
        samples: Path,
        trackers: Sequence[Tracker] = (),
        processes: ProcessGroup = SINGLE,
    ) -> None:
        self._pipeline, self._conditioning, self._choices, self._processes = pipeline, conditioning, choices, processes
        self._samples, self._trackers = samples, trackers
        few = instance[: preview_grid.shown(choices.settings.num_validation_images)]  # kept: files may go during a run
        self._instance = [load_image(path, resolution=choices.resolution) for path in few]

    def __call__(self, updates: int) -> None:
        count = self._choices.settings.num_validation_images
        if not count:
            return
        try:
            rows = [self._pictures(conditioning, count) for conditioning in self._conditioning]
            if self._processes.is_main:
                self._show(updates, rows)
        except ProcessLost:
            raise
        except Exception as error:  # a pipeline or a disk may fail in any way; hours of training must not be lost
            logger.warning("preview after update %d failed (%s: %s)", updates, type(error).__name__, error)
        release(self._pipeline, "images")
        mx.clear_cache()

    def _show(self, updates: int, rows: Sequence[Sequence[np.ndarray]]) -> None:
        count = len(rows[0])
        save_image(
            preview_grid.preview_file(self._samples, updates), grid([p for row in rows for p in row], count, gap=0)
        )
        preview_grid.write_progress(self._samples, self._instance, columns=count)
        for prompt, row in zip(self._choices.validation_prompt, rows, strict=True):
            for tracker in self._trackers:
                tracker.image("preview", updates, grid(row, count), prompt)

    def _pictures(self, conditioning: Conditioning, count: int) -> list[np.ndarray]:
        choices, processes = self._choices, self._processes
        size = min(images_per_batch(choices.resolution), -(-count // processes.size))
        failed: list[Exception] = []

        def drawn(members: range) -> list[mx.array]:
            keys = sample_keys(choices.settings.seed, Stream.PREVIEW, 0, members)
            asked: dict[str, Any] = {"resolution": choices.resolution, "guidance": choices.guidance}
            try:
                return [mx.array(picture) for picture in sample_images(self._pipeline, conditioning, keys, **asked)]
            except Exception as error:  # to be raised in all processes, none of which must wait for this one
                failed.append(error)
                return []

        groups = [range(start, min(start + size, count)) for start in range(0, count, size)]
        pictures = [np.array(picture) for _, some in processes.map_in_rounds(groups, drawn) for picture in some]
        whys = processes.gather([f"{type(error).__name__}: {error}" for error in failed])
        if failed:
            raise failed[0]
        if any(whys):
            raise RunError(f"in another process: {next(why[0] for why in whys if why)}")
        return pictures
