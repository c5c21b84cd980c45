"""Flags for a training that ran out of memory, those that change the result least first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from mflux_vae.runtime.device import compute_dtype
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.vae.build import has_vector_latents
from mflux_vae_train.vae.config import VAETrainingSettings


def less_memory(settings: VAETrainingSettings, network: Any, folder: Path) -> str:
    """A clause without a full stop; empty if there are no such flags."""
    flags = " or ".join(_flags(settings, network))
    changes = "change by --allow_changes" if checkpoint.numbered(folder) else "give"
    return f"{changes} {flags}" if flags else ""


def _flags(settings: VAETrainingSettings, network: Any) -> Iterator[str]:
    spatial = not has_vector_latents(network)
    if spatial and not settings.gradient_checkpointing:
        yield "--gradient_checkpointing"
    if settings.batch_size > 1:
        parts = 2 if settings.batch_size % 2 == 0 else settings.batch_size
        accumulation = settings.gradient_accumulation_steps * parts
        yield f"--batch_size {settings.batch_size // parts} --gradient_accumulation_steps {accumulation}"
    if not settings.mixed_precision and compute_dtype(mx.bfloat16) == mx.bfloat16:
        yield "--mixed_precision"
    multiple = network.config.downsampling
    if spatial and settings.image_size > multiple:
        yield f"--image_size {max(settings.image_size * 3 // 4 // multiple * multiple, multiple)}"
