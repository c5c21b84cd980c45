"""How many pictures show what their prompts say, by the checker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mflux_vae.images import to_pictures
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.tiny_world.checker import read, shows
from mflux_vae_train.tiny_world.world import Scene

BATCH = 48


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of pictures with the right shape, colour, background, and all of them."""

    shape: float
    colour: float
    background: float
    all: float
    count: int


def pictures(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    guidance: float | None = None,
    steps: int | None = None,
) -> np.ndarray:
    """One picture for each prompt, uint8 (N, H, W, 3), at the recommended settings where none are given."""
    advice = pipeline.recommended
    size = (advice.resolution, advice.resolution)
    drawn = []
    for start in range(0, len(prompts), BATCH):
        chunk = list(prompts[start : start + BATCH])
        images = pipeline.sample(
            pipeline.encode_prompts(chunk),
            size=size,
            steps=steps or advice.steps,
            guidance=advice.guidance if guidance is None else guidance,
            key=sample_keys(seed, Stream.EVALUATION, 0, range(start, start + len(chunk))),
        )
        drawn.append(to_pictures(np.array(images)))
    return np.concatenate(drawn)


def accuracy(images: np.ndarray, truths: Sequence[Scene]) -> Accuracy:
    """Compare pictures with what they should show."""
    readings = [read(image) for image in images]
    return Accuracy(
        shape=_share(r.shape == t.shape for r, t in zip(readings, truths, strict=True)),
        colour=_share(r.colour == t.colour for r, t in zip(readings, truths, strict=True)),
        background=_share(r.background == t.background for r, t in zip(readings, truths, strict=True)),
        all=_share(shows(r, t) for r, t in zip(readings, truths, strict=True)),
        count=len(truths),
    )


def _share(hits: Iterable[bool]) -> float:
    return float(np.mean(list(hits)))
