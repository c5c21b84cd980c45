"""What a pipeline may offer to take less memory, used where it does; pipelines that offer nothing are trained, too."""

from __future__ import annotations

import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.pipelines.capabilities import (
    Estimates,
    LimitsPrompts,
    Quantizes,
    Recomputes,
    SupportsRelease,
    TrainsTextEncoder,
    Use,
)
from mflux_vae_train.pipelines.protocol import DiffusionPipeline


def check(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> None:
    """
    Raises:
        SettingsError: the settings ask for what the pipeline does not offer.
    """
    needing = {
        "--quantize": (settings.quantize is not None, Quantizes),
        "--gradient_checkpointing": (settings.gradient_checkpointing, Recomputes),
        "--train_batch_size auto": (settings.train_batch_size is None, Estimates),
        "--memory_limit": (settings.memory_limit is not None, Estimates),
        "--max_sequence_length": (settings.max_sequence_length is not None, LimitsPrompts),
        "--train_text_encoder": (settings.train_text_encoder, TrainsTextEncoder),
    }
    for flag, (asked, capability) in needing.items():
        if asked and not isinstance(pipeline, capability):
            raise SettingsError(
                f"{flag}: pipeline {pipeline.name} does not offer it (capabilities.{capability.__name__})"
            )


def apply(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> None:
    """Let the pipeline hold and compute what the settings say, from now on."""
    if settings.quantize is not None and isinstance(pipeline, Quantizes):
        pipeline.quantize(settings.quantize)
    if settings.max_sequence_length is not None and isinstance(pipeline, LimitsPrompts):
        pipeline.prompt_limit = settings.max_sequence_length
    if isinstance(pipeline, TrainsTextEncoder):
        pipeline.encode_text_in_step(settings.train_text_encoder)
    if isinstance(pipeline, Recomputes):
        pipeline.recompute_activations(settings.gradient_checkpointing)


def release(pipeline: DiffusionPipeline, use: Use) -> None:
    """Give back what serves a use that is over, for now."""
    if isinstance(pipeline, SupportsRelease):
        pipeline.release(use)


def outline_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The denoiser's layers, not loaded if that can be helped: for who only wants names and shapes."""
    return pipeline.outline() if isinstance(pipeline, Estimates) else pipeline.denoiser
