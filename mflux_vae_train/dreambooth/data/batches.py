"""Cached latents -> micro-batches. A sample is a function of (seed, update, index) alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from mflux_vae_train.randomness import Stream, rng, sample_keys
from mflux_vae_train.training.step import MicroBatch

INSTANCE, CLASS = 0, 1
"""Which set a sample is drawn from; part of the names of random draws. Those of further concepts follow CLASS."""


@lru_cache(maxsize=8)
def _permutation(seed: int, which: int, count: int, epoch: int) -> np.ndarray:
    return rng(seed, Stream.DATA_ORDER, epoch, which).permutation(count)


def shuffled(seed: int, which: int, count: int, position: int) -> int:
    """Element at a position of the endless order that runs through all `count` elements, ever reshuffled."""
    epoch, place = divmod(position, count)
    return int(_permutation(seed, which, count, epoch)[place])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many samples a run draws, and how they fall into updates.

    Attributes:
        samples: instance samples over the whole run.
        batch_size: most instance samples in a micro-batch.
        accumulation: micro-batches in an update, where all samples have one shape; the run's last update may hold
            fewer. What an update sees is `batch_size` times `accumulation` samples, whatever their shapes.
    """

    samples: int
    batch_size: int
    accumulation: int

    @property
    def window(self) -> int:
        """Instance samples in an update."""
        return self.batch_size * self.accumulation

    @property
    def updates(self) -> int:
        return -(-self.samples // self.window)

    def positions(self, update: int) -> range:
        """Positions of the instance samples of an update."""
        return range(update * self.window, min((update + 1) * self.window, self.samples))


Latent: TypeAlias = mx.array
"""Of one picture, without a batch's axis."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An instance picture, once for each of its repeats.

    Attributes:
        entries: numbers of its latents in `EncodedDataset.latents`, by place and there mirrored or not.
        prompt: row of its prompt, and `class_prompt` of that of its class; None where nothing is preserved.
        concept: number of the concept that it shows.
    """

    entries: Sequence[Sequence[int]]
    prompt: int
    class_prompt: int | None = None
    concept: int = 0


@dataclass(frozen=True, kw_only=True)
class EncodedDataset:
    """All that training needs of pictures and prompts, encoded once.

    Attributes:
        samples: what an epoch goes through.
        latents: of the instance pictures, one for each view.
        masks: what each place of them counts, (h, w, 1) each; None where all count alike.
        prior: latents of the class pictures, by concept and shape of the instance's latents; None without class
            pictures.
        prompts: conditioning, a row for each prompt.
        empty: row of the empty prompt.
        preserves_output: whether instance samples are repeated with their class prompts, see
            `objective.add_base_prediction`.
    """

    samples: Sequence[Sample]
    latents: Sequence[Latent]
    masks: Sequence[mx.array] | None = None
    prior: Mapping[tuple[int, tuple[int, ...]], Sequence[Latent]] | None = None
    prompts: Mapping[str, mx.array]
    empty: int
    preserves_output: bool = False


class _Drawn(NamedTuple):
    """What was drawn for one position: a sample, and the entry of it."""

    sample: Sample
    entry: int
    position: int
    place: int  # in the update


def _drawn(cache: EncodedDataset, seed: int, position: int, place: int) -> _Drawn:
    count = len(cache.samples)
    number = shuffled(seed, INSTANCE, count, position)
    sample = cache.samples[number]
    crop = mirrored = 0
    if len(sample.entries) * len(sample.entries[0]) > 1:
        draws = rng(seed, Stream.AUGMENT, position // count, number)
        crop, mirrored = int(draws.integers(len(sample.entries))), int(draws.integers(len(sample.entries[0])))
    return _Drawn(sample, sample.entries[crop][mirrored], position, place)


def micro_batches(
    cache: EncodedDataset, plan: Plan, *, update: int, seed: int, caption_dropout: float
) -> list[MicroBatch]:
    """The micro-batches of one update: its samples in order, those of one shape together, cut by the batch size.

    Everything random about a sample follows from its place in the update, not from the micro-batch it falls into, so
    that four micro-batches of one are one of four.
    """
    positions = plan.positions(update)
    by_shape: dict[tuple[int, ...], list[_Drawn]] = {}
    for position in positions:
        drawn = _drawn(cache, seed, position, position - positions.start)
        by_shape.setdefault(cache.latents[drawn.entry].shape, []).append(drawn)
    return [
        _micro_batch(
            cache, alike[start : start + plan.batch_size], update=update, seed=seed, caption_dropout=caption_dropout
        )
        for alike in by_shape.values()
        for start in range(0, len(alike), plan.batch_size)
    ]


def _micro_batch(
    cache: EncodedDataset, drawn: Sequence[_Drawn], *, update: int, seed: int, caption_dropout: float
) -> MicroBatch:
    """One micro-batch: the instance samples, then as many that preserve the prior, where it is preserved.

    Returns:
        a tree of arrays, batch first: `latents`, `conditioning` (by name), `key` for noise, `dropout_key` for
        adapters, and `mask` where the data set has masks. The weight is the number of instance samples.
    """
    latents = [cache.latents[one.entry] for one in drawn]
    prompts = [one.sample.prompt for one in drawn]
    draws = [2 * one.place + INSTANCE for one in drawn]
    noise = list(draws)
    if cache.prior is not None or cache.preserves_output:
        own = [2 * one.place + CLASS for one in drawn]
        prompts += [_row_of_class(one.sample) for one in drawn]
        draws += own
        # the base model's output is compared on the very latents that the instance is learnt from, noise and all
        noise += noise if cache.prior is None else own
        latents += latents if cache.prior is None else [_class_latent(cache, one, seed) for one in drawn]
    rows = mx.array(
        [
            cache.empty if caption_dropped(seed, update, draw, caption_dropout) else prompt
            for draw, prompt in zip(draws, prompts, strict=True)
        ]
    )
    arrays: dict[str, Any] = {
        "latents": mx.stack(latents),
        "key": sample_keys(seed, Stream.NOISE, update, noise),
        "dropout_key": sample_keys(seed, Stream.LORA_DROPOUT, update, draws),
        "conditioning": {name: array[rows] for name, array in cache.prompts.items()},
    }
    if cache.masks is not None:
        masks = [cache.masks[one.entry] for one in drawn]
        arrays["mask"] = mx.stack(masks + [mx.ones_like(masks[0])] * (len(latents) - len(masks)))
    return MicroBatch(arrays=arrays, weight=len(drawn))


def _row_of_class(sample: Sample) -> int:
    if sample.class_prompt is None:
        raise ValueError("the prior is to be preserved, and a sample has no class prompt")
    return sample.class_prompt


def _class_latent(cache: EncodedDataset, drawn: _Drawn, seed: int) -> Latent:
    assert cache.prior is not None
    concept = drawn.sample.concept
    pictures = cache.prior[concept, cache.latents[drawn.entry].shape]
    return pictures[shuffled(seed, CLASS + concept, len(pictures), drawn.position)]


def caption_dropped(seed: int, update: int, draw: int, share: float) -> bool:
    """Whether the caption of a sample is replaced by the empty prompt."""
    return share > 0 and rng(seed, Stream.CAPTION_DROPOUT, update, draw).random() < share
