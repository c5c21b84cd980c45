"""A small data set: one concept, one crop per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mflux_vae_train.dreambooth.data.batches import EncodedDataset, Sample

PROMPT, CLASS_PROMPT, EMPTY = range(3)
"""Rows of the conditioning."""


def small_dataset(
    instance: mx.array, class_latents: mx.array | None, conditioning: Mapping[str, mx.array], **changes: Any
) -> EncodedDataset:
    """Latents of instance and class images, batch first; rows of the conditioning in the order above."""
    samples = [
        Sample(latents=[[index]], prompt=PROMPT, class_prompt=CLASS_PROMPT) for index in range(instance.shape[0])
    ]
    given = {
        "samples": samples,
        "latents": list(instance),
        "class_latents": None if class_latents is None else {(0, tuple(instance.shape[1:])): list(class_latents)},
        "conditioning": conditioning,
        "empty_prompt": EMPTY,
    }
    return EncodedDataset(**{**given, **changes})
