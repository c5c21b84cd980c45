"""Training images, number of updates, and the batches and learning rate of each update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mflux_vae.images import to_pixels
from mflux_vae.utils.formatting import count_text
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.training import lr_schedule
from mflux_vae_train.training.step import MicroBatch
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.data.batches import Augmentation, Batches, Source, open_data, split


class Plan:
    """Updates, epochs, batches and learning rates of a run, all functions of the update number.

    Batches continue across epoch boundaries; an epoch is rounded to whole updates.

    Attributes:
        images: images per update.
        per_epoch: updates per epoch.
        total: updates of the run.

    Args:
        processes: processes that share the micro-batches of each update.
    """

    def __init__(self, settings: VAETrainingSettings, train: Source, processes: ProcessGroup = SINGLE) -> None:
        self._settings = settings
        self.images = settings.batch_size * settings.gradient_accumulation_steps
        self.per_epoch = max(1, round(len(train) / self.images))
        self.total = self.per_epoch * settings.num_epochs
        augmentation = Augmentation(flip=settings.augment_flip, shift=settings.augment_shift)
        size = settings.batch_size
        starts = processes.shard(range(0, self.images, size))
        self._rows = [row for start in starts for row in range(start, start + size)]
        options: dict[str, Any] = {"seed": settings.seed, "augmentation": augmentation}
        self._batches = Batches(train, batch=self.images, rows=self._rows, **options) if self._rows else None

    def warnings(self) -> list[str]:
        """One line for each setting that does not fit the length of the run."""
        settings, lines = (
            self._settings,
            lr_schedule.schedule_warnings(total=self.total, warmup=self._settings.lr_warmup_steps),
        )
        epochs = f"the run has {count_text(settings.num_epochs, 'epoch')}"
        if settings.lr_scheduler == "step" and settings.lr_step_epochs >= settings.num_epochs:
            lines.append(f"--lr_step_epochs {settings.lr_step_epochs} has no effect: {epochs}")
        if settings.early_stopping is not None and settings.early_stopping > settings.num_epochs // settings.val_every:
            lines.append(f"--early_stopping {settings.early_stopping} has no effect: {epochs}")
        if settings.disc_start is not None and settings.disc_start >= self.total:
            lines.append(f"--disc_start {settings.disc_start} has no effect: the run has {self.total:,} updates")
        if settings.loss_type == "beta_vae" and not settings.beta_cyclical and settings.beta_steps > self.total:
            lines.append(
                f"--beta_steps {settings.beta_steps}: beta does not reach --beta_end {settings.beta_end:g}, as the run"
                f" has {self.total:,} updates"
            )
        return lines

    def learning_rate(self) -> Callable[[int], float]:
        """Function: update -> learning rate."""
        settings = self._settings
        step_epochs = {"exponential": 1, "step": settings.lr_step_epochs}.get(settings.lr_scheduler)
        return lr_schedule.learning_rate(
            peak=settings.learning_rate,
            total=self.total,
            warmup=settings.lr_warmup_steps,
            shape=settings.lr_scheduler if step_epochs is None else lr_schedule.STEP_DECAY,
            gamma=settings.lr_gamma,
            step_size=self.per_epoch * (step_epochs or 1),
            warn=lambda _: None,  # `warnings` has them
        )

    def batches(self, update: int, *, beta: float) -> list[MicroBatch]:
        """Micro-batches of an update for `Objective`, those of this process only (possibly none)."""
        if self._batches is None:
            return []
        pixels = to_pixels(self._batches(update))
        keys = sample_keys(self._settings.seed, Stream.NOISE, update, self._rows)
        size = self._settings.batch_size
        return [
            MicroBatch(
                arrays={
                    "pixels": mx.array(pixels[start : start + size]),
                    "key": keys[start : start + size],
                    "beta": mx.array(beta),
                },
                weight=size,
            )
            for start in range(0, len(self._rows), size)
        ]

    def close(self) -> None:
        """Stop prefetching."""
        if self._batches is not None:
            self._batches.close()


def open_images(settings: VAETrainingSettings, source: Source | None = None) -> tuple[Source, Source]:
    """Training images and held-out images: the test split of the data, or a random fraction.

    Args:
        source: images that replace `settings.data`.
    """
    if source is not None:
        return split(source, settings.val_share, settings.seed)
    train, test = open_data(
        settings.data,
        size=settings.image_size,
        channels=settings.in_channels,
        kind=settings.data_kind,
        video_list=settings.data_list,
        seed=settings.seed,
        count=settings.data_count,
    )
    return split(train, settings.val_share, settings.seed) if test is None else (train, test)
