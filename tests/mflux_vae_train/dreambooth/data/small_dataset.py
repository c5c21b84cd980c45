"""Caches of the plainest kind: one concept, one view of each picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mflux_vae_train.dreambooth.data.batches import EncodedDataset, Sample

PROMPT, CLASS_PROMPT, EMPTY = range(3)
"""Rows of the conditioning."""


def small_dataset(
    instance: mx.array, prior: mx.array | None, prompts: Mapping[str, mx.array], **changes: Any
) -> EncodedDataset:
    """Latents of instance and class pictures, batch first; prompts in the order above."""
    samples = [
        Sample(entries=[[number]], prompt=PROMPT, class_prompt=CLASS_PROMPT) for number in range(instance.shape[0])
    ]
    pictures = None if prior is None else {(0, tuple(instance.shape[1:])): list(prior)}
    given = {"samples": samples, "latents": list(instance), "prior": pictures, "prompts": prompts, "empty": EMPTY}
    return EncodedDataset(**{**given, **changes})
