"""Which images a training has, how many updates it makes, and what each sees: functions of the update alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mflux_vae.images import to_pixels
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.training import lr_schedule
from mflux_vae_train.training.step import MicroBatch
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.data.batches import Augmentation, Batches, Source, open_data, split


class Plan:
    """Updates, epochs and rates of a training.

    Batches run on from one epoch into the next; an epoch ends with the update that is nearest to its end.

    Attributes:
        images: in an update.
        per_epoch: updates.
        total: updates of the whole run.

    Args:
        processes: the processes that share out the micro-batches of each update.
    """

    def __init__(self, settings: VAETrainingSettings, train: Source, processes: ProcessGroup = SINGLE) -> None:
        self._settings = settings
        self.images = settings.batch_size * settings.gradient_accumulation_steps
        self.per_epoch = max(1, round(len(train) / self.images))
        self.total = self.per_epoch * settings.num_epochs
        augmentation = Augmentation(flip=settings.augment_flip, shift=settings.augment_shift)
        size = settings.batch_size
        self._starts = processes.shard(range(0, self.images, size))
        self._places = [place for start in self._starts for place in range(start, start + size)]
        options: dict[str, Any] = {"seed": settings.seed, "augmentation": augmentation}
        self._batches = Batches(train, batch=self.images, places=self._places, **options) if self._places else None

    def learning_rate(self) -> Callable[[int], float]:
        """Update -> rate."""
        settings = self._settings
        stairs = {"exponential": 1, "step": settings.lr_step_epochs}
        stair = stairs.get(settings.lr_scheduler)
        return lr_schedule.learning_rate(
            peak=settings.learning_rate,
            total=self.total,
            warmup=settings.lr_warmup_steps,
            shape=settings.lr_scheduler if stair is None else lr_schedule.STEP_DECAY,
            gamma=settings.lr_gamma,
            step_size=self.per_epoch * (stair or 1),
        )

    def batches(self, update: int, *, beta: float) -> list[MicroBatch]:
        """What `Objective` takes: the micro-batches of an update that fall to this process, maybe none."""
        if self._batches is None:
            return []
        pixels = to_pixels(self._batches(update))
        keys = sample_keys(self._settings.seed, Stream.NOISE, update, self._places)
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
            for start in range(0, len(self._places), size)
        ]

    def close(self) -> None:
        """End reading ahead."""
        if self._batches is not None:
            self._batches.close()


def images_of(settings: VAETrainingSettings, source: Source | None = None) -> tuple[Source, Source]:
    """Images to train on, and held-out ones: the data's test split, or a share.

    Args:
        source: in place of what the settings name.
    """
    if source is not None:
        return split(source, settings.val_share, settings.seed)
    train, test = open_data(
        settings.data,
        size=settings.image_size,
        channels=settings.in_channels,
        kind=settings.data_kind,
        listed=settings.data_list,
        seed=settings.seed,
        count=settings.data_count,
    )
    return split(train, settings.val_share, settings.seed) if test is None else (train, test)
