"""Encoded images -> micro-batches. A sample is a pure function of (seed, update, index)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.randomness import Stream, rng, sample_keys
from mflux_vae_train.training.step import Arrays, MicroBatch

INSTANCE, CLASS = 0, 1
"""The source of a sample, a part of the keys of its random draws. Class images of concept i have CLASS + i."""


ClassKey: TypeAlias = "tuple[int, tuple[int, ...]]"
"""Concept, and shape of its instance latents that the class images are cropped for."""


@lru_cache(maxsize=8)
def _permutation(seed: int, source: int, count: int, epoch: int) -> np.ndarray:
    return rng(seed, Stream.DATA_ORDER, epoch, source).permutation(count)


def shuffled_index(seed: int, source: int, count: int, position: int) -> int:
    """Index at a position of an endless order, which visits all `count` elements and is reshuffled every epoch."""
    epoch, index = divmod(position, count)
    return int(_permutation(seed, source, count, epoch)[index])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many samples a run draws, and how they are grouped into updates.

    Attributes:
        samples: instance samples in the whole run.
        batch_size: maximum number of instance samples in a micro-batch.
        accumulation: micro-batches per update if all samples have one shape. An update sees `batch_size` times
            `accumulation` samples of any shape; the last update of a run may see fewer.
        joined: maximum number of micro-batches of one shape that are computed as one.
    """

    samples: int
    batch_size: int
    accumulation: int
    joined: int = 1

    @property
    def updates(self) -> int:
        return -(-self.samples // (self.batch_size * self.accumulation))

    def positions(self, update: int) -> range:
        """Positions of the instance samples of an update."""
        size = self.batch_size * self.accumulation
        return range(update * size, min((update + 1) * size, self.samples))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An instance image, listed once per repeat.

    Attributes:
        latents: indices into `EncodedDataset.latents`: a row per crop; in it the plain and the mirrored latent.
        prompt: row of its prompt in the conditioning.
        class_prompt: row of its class prompt; unused without prior preservation.
        concept: index of its concept.
    """

    latents: Sequence[Sequence[int]]
    prompt: int
    class_prompt: int = 0
    concept: int = 0


@dataclass(frozen=True, kw_only=True)
class EncodedDataset:
    """Latents and conditioning of all images and prompts. Training needs no other data.

    Attributes:
        samples: the samples of an epoch.
        latents: one array per crop of an instance image, without a batch axis.
        masks: loss weight of each latent position, (h, w, 1) per array in `latents`; None without masks.
        crops: conditioning on size and crop, one row per array in `latents`; None if the pipeline has none.
        class_latents: latents of the class images by (concept, shape of the instance latent); None without class
            images.
        class_crops: conditioning on their size and crop, as `crops`.
        conditioning: arrays with one row per prompt.
        empty_prompt: row of the empty prompt.
        preserves_output: whether each instance sample is repeated with its class prompt, see
            `objective.add_base_prediction`.
    """

    samples: Sequence[Sample]
    latents: Sequence[mx.array]
    masks: Sequence[mx.array] | None = None
    crops: Conditioning | None = None
    class_latents: Mapping[ClassKey, Sequence[mx.array]] | None = None
    class_crops: Mapping[ClassKey, Conditioning] | None = None
    conditioning: Conditioning
    empty_prompt: int
    preserves_output: bool = False


class _Draw(NamedTuple):
    """A sample drawn for a position, and the index of its latent."""

    sample: Sample
    latent: int
    position: int
    slot: int  # index in the update


def _draw(dataset: EncodedDataset, seed: int, position: int, slot: int) -> _Draw:
    count = len(dataset.samples)
    index = shuffled_index(seed, INSTANCE, count, position)
    sample = dataset.samples[index]
    crop = mirrored = 0
    if len(sample.latents) * len(sample.latents[0]) > 1:
        draws = rng(seed, Stream.AUGMENT, position // count, index)
        crop, mirrored = int(draws.integers(len(sample.latents))), int(draws.integers(len(sample.latents[0])))
    return _Draw(sample, sample.latents[crop][mirrored], position, slot)


def micro_batches(
    dataset: EncodedDataset,
    plan: Plan,
    *,
    update: int,
    seed: int,
    caption_dropout: float,
    processes: ProcessGroup = SINGLE,
) -> list[MicroBatch]:
    """This process's micro-batches of one update: samples in order, grouped by shape, split by the batch size.

    Randomness depends on the sample's slot in the update and not on its micro-batch. So four micro-batches of one
    sample equal one micro-batch of four, which `Plan.joined` makes of them.

    Returns:
        instance samples, followed by as many class samples if the prior is preserved. A tree of arrays, batch first:
        `latents`, `conditioning` (by name), `key` for noise, `dropout_key` for adapters, and `mask` if the data set
        has masks. The weight is the number of instance samples.
    """
    by_shape: dict[tuple[int, ...], list[_Draw]] = {}
    for slot, position in enumerate(plan.positions(update)):
        draw = _draw(dataset, seed, position, slot)
        by_shape.setdefault(dataset.latents[draw.latent].shape, []).append(draw)

    def prompt_row(stream: int, prompt: int) -> int:
        random = rng(seed, Stream.CAPTION_DROPOUT, update, stream).random() if caption_dropout > 0 else 1.0
        return dataset.empty_prompt if random < caption_dropout else prompt

    def build(draws: Sequence[_Draw]) -> MicroBatch:
        latents = [dataset.latents[draw.latent] for draw in draws]
        crops = [_row(dataset.crops, draw.latent) for draw in draws]
        prompts = [draw.sample.prompt for draw in draws]
        streams = noise = [2 * draw.slot + INSTANCE for draw in draws]
        if dataset.class_latents is not None or dataset.preserves_output:
            class_streams = [2 * draw.slot + CLASS for draw in draws]
            prompts += [draw.sample.class_prompt for draw in draws]
            # output preservation compares with the base model on the same latents and noise as the instance
            noise = streams + (streams if dataset.class_latents is None else class_streams)
            streams = streams + class_streams
            if dataset.class_latents is None:
                latents, crops = latents * 2, crops * 2
            else:
                prior = [_class_sample(dataset, one, seed) for one in draws]
                latents, crops = latents + [one for one, _ in prior], crops + [crop for _, crop in prior]
        rows = mx.array(list(map(prompt_row, streams, prompts)))
        arrays: dict[str, Any] = {
            "latents": mx.stack(latents),
            "key": sample_keys(seed, Stream.NOISE, update, noise),
            "dropout_key": sample_keys(seed, Stream.LORA_DROPOUT, update, streams),
            "conditioning": _conditioning(dataset, rows, crops),
        }
        if dataset.masks is not None:
            masks = [dataset.masks[draw.latent] for draw in draws]
            arrays["mask"] = mx.stack(masks + [mx.ones_like(masks[0])] * (len(latents) - len(masks)))
        return MicroBatch(arrays=arrays, weight=len(draws))

    size = plan.batch_size
    groups = [draws[i : i + size] for draws in by_shape.values() for i in range(0, len(draws), size)]
    joined: list[MicroBatch] = []
    for _, same in groupby(processes.shard(groups), key=lambda draws: dataset.latents[draws[0].latent].shape):
        rest = list(same)
        joined += [build([*chain(*rest[i : i + plan.joined])]) for i in range(0, len(rest), plan.joined)]
    return joined


def fixed_batch(dataset: EncodedDataset, indices: Sequence[int], key: mx.array) -> Arrays:
    """The arrays of a micro-batch of instance samples that are always the same: their first crop, with their prompt.

    Args:
        indices: of samples whose latents have one shape.
        key: for noise, one row per sample.
    """
    samples = [dataset.samples[index] for index in indices]
    latents = [one.latents[0][0] for one in samples]
    crops = [_row(dataset.crops, index) for index in latents]
    arrays: dict[str, Any] = {
        "latents": mx.stack([dataset.latents[index] for index in latents]),
        "key": key,
        "conditioning": _conditioning(dataset, mx.array([one.prompt for one in samples]), crops),
    }
    if dataset.masks is not None:
        arrays["mask"] = mx.stack([dataset.masks[index] for index in latents])
    return arrays


def _conditioning(dataset: EncodedDataset, rows: mx.array, crops: Sequence[Conditioning]) -> Conditioning:
    """Conditioning of samples: these rows of prompts, and what describes their crops."""
    return {
        **{name: array[rows] for name, array in dataset.conditioning.items()},
        **{name: mx.concatenate([crop[name] for crop in crops]) for name in crops[0]},
    }


def _class_sample(dataset: EncodedDataset, draw: _Draw, seed: int) -> tuple[mx.array, Conditioning]:
    """Latent of a class image, and its row of `class_crops`."""
    assert dataset.class_latents is not None
    key = draw.sample.concept, dataset.latents[draw.latent].shape
    latents = dataset.class_latents[key]
    index = shuffled_index(seed, CLASS + draw.sample.concept, len(latents), draw.position)
    return latents[index], _row(None if dataset.class_crops is None else dataset.class_crops[key], index)


def _row(arrays: Conditioning | None, index: int) -> Conditioning:
    return {name: array[index : index + 1] for name, array in (arrays or {}).items()}
