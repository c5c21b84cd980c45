"""Sample images for prompts, and measure how many show what the prompts say."""

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
    """Fractions of images with the right shape, colour, background, and with all of these."""

    shape: float
    colour: float
    background: float
    all: float
    count: int


def sample_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    guidance: float | None = None,
    steps: int | None = None,
) -> np.ndarray:
    """One image per prompt, uint8 (N, H, W, 3). Guidance and steps default to the recommended ones."""
    recommended = pipeline.recommended
    size = (recommended.resolution, recommended.resolution)
    sampled = []
    for start in range(0, len(prompts), BATCH):
        chunk = list(prompts[start : start + BATCH])
        images = pipeline.sample(
            pipeline.encode_prompts(chunk),
            size=size,
            steps=steps or recommended.steps,
            guidance=recommended.guidance if guidance is None else guidance,
            key=sample_keys(seed, Stream.EVALUATION, 0, range(start, start + len(chunk))),
        )
        sampled.append(to_pictures(np.array(images)))
    return np.concatenate(sampled)


def accuracy(images: np.ndarray, truths: Sequence[Scene]) -> Accuracy:
    """Compare images with the scenes of their prompts."""
    readings = [read(image) for image in images]
    return Accuracy(
        shape=_fraction(r.shape == t.shape for r, t in zip(readings, truths, strict=True)),
        colour=_fraction(r.colour == t.colour for r, t in zip(readings, truths, strict=True)),
        background=_fraction(r.background == t.background for r, t in zip(readings, truths, strict=True)),
        all=_fraction(shows(r, t) for r, t in zip(readings, truths, strict=True)),
        count=len(truths),
    )


def _fraction(hits: Iterable[bool]) -> float:
    return float(np.mean(list(hits)))
