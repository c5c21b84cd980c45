"""Previews: images of the validation prompts at fixed seeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import PluginError, RunError
from mflux_vae.images import grid, save_image
from mflux_vae.runtime import device
from mflux_vae.runtime.device_errors import device_error
from mflux_vae.utils.formatting import shortened
from mflux_vae_train import lora
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.distributed.watchdog import ProcessLost
from mflux_vae_train.dreambooth.data.encoding import SHOWN_PROMPT, images_per_batch
from mflux_vae_train.dreambooth.data.sampling import is_one_colour, preview_batches, sample_images
from mflux_vae_train.dreambooth.pipeline_features import release
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.dreambooth.preview_model import adapted
from mflux_vae_train.dreambooth.reporting import preview_grid
from mflux_vae_train.monitoring.trackers import Tracker
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline
from mflux_vae_train.randomness import Stream, sample_keys

logger = logging.getLogger(__name__)


class Previews:
    """Called with the number of updates made; writes a row of images per prompt, and the grid of all previews so far.

    Image i of a prompt starts from the same noise each time, so that previews differ only by the training. Errors
    are logged and do not end the run, except those of a CUDA device: its memory may hold anything after one.

    Args:
        pipeline: holds the adapter.
        drawing: draws with it.
        conditioning: of each validation prompt, one row each.
        subject: instance images for the top row of the grid, uint8 (resolution, resolution, 3).
        samples: output folder.
        trackers: also receive the images.
        processes: share the sampling; the first one writes.

    Raises:
        DeviceError: the CUDA device failed.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        conditioning: Sequence[Conditioning],
        resolved: ResolvedSettings,
        *,
        drawing: DiffusionPipeline,
        subject: Sequence[np.ndarray],
        samples: Path,
        trackers: Sequence[Tracker] = (),
        processes: ProcessGroup = SINGLE,
    ) -> None:
        self._pipeline, self._drawing, self._conditioning = pipeline, drawing, conditioning
        self._resolved, self._processes = resolved, processes
        self._subject, self._samples, self._trackers = subject, samples, trackers
        self._count = resolved.num_validation_images

    def __call__(self, update: int) -> None:
        if not self._count:
            return
        try:
            prompts = self._resolved.validation_prompt
            with lora.without_assistant(self._pipeline.denoiser), adapted(self._pipeline, self._drawing):
                rows = [self._sample(*one) for one in zip(prompts, self._conditioning, strict=True)]
            if self._processes.is_main:
                self._write(update, rows)
        except ProcessLost:
            raise
        except Exception as error:  # a failing pipeline or disk must not end hours of training
            if isinstance(error, PluginError) and update == 0:
                raise
            failure, cure = device_error(error), ""
            if failure is not None and failure.memory:
                at_once = min(images_per_batch(self._resolved.resolution), self._count)
                cure = f"give --num_validation_images {min(at_once - 1, 1)}"  # a run that is continued can take it
                failure = failure.but(cure=cure)
            if failure is not None and device.kind() == "cuda":
                raise failure from error
            device.release_arrays(error)
            logger.warning(
                "preview after update %d failed (%s: %s)%s", update, type(error).__name__, error, cure and f"; {cure}"
            )
        release(self._drawing, "images")
        mx.clear_cache()

    def _write(self, update: int, rows: Sequence[Sequence[np.ndarray]]) -> None:
        sheet = grid([image for row in rows for image in row], self._count, gap=0)
        save_image(preview_grid.preview_file(self._samples, update), sheet)
        preview_grid.write_progress(self._samples, self._subject, columns=self._count)
        for prompt, row in zip(self._resolved.validation_prompt, rows, strict=True):
            if plain := sum(map(is_one_colour, row)):
                shown = shortened(prompt, SHOWN_PROMPT)
                logger.warning("preview after update %d: %d of %d images of %r are one colour: training has diverged,"
                    " or the device failed", update, plain, len(row), shown)  # fmt: skip
            for tracker in self._trackers:
                tracker.image("preview", update, grid(row, self._count), prompt)

    def _sample(self, prompt: str, conditioning: Conditioning) -> list[np.ndarray]:
        """The images of one prompt, in all processes."""
        resolved, processes, count = self._resolved, self._processes, self._count
        size = (resolved.resolution, resolved.resolution)
        errors: list[Exception] = []

        def sample(batch: range) -> list[mx.array]:
            keys = sample_keys(resolved.seed, Stream.PREVIEW, 0, batch)
            try:
                names = [f"image {index} of {shortened(prompt, SHOWN_PROMPT)!r}" for index in batch]
                options: dict[str, Any] = {"guidance": resolved.drawing_guidance, "steps": resolved.drawing_steps}
                images = sample_images(self._drawing, conditioning, keys, names, size=size, **options)
                return [mx.array(image) for image in images]
            except Exception as error:  # raised below in all processes, so that none waits for this one
                errors.append(error)
                return []

        batches = preview_batches(count, size, processes.size)
        images = [np.array(image) for _, batch in processes.map_in_rounds(batches, sample) for image in batch]
        messages = processes.gather([f"{type(error).__name__}: {error}" for error in errors])
        if errors:
            raise errors[0]
        if any(messages):
            raise RunError(f"in another process: {next(message[0] for message in messages if message)}")
        return images
