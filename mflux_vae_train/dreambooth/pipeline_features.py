"""Optional features of a pipeline: check that it has the requested ones, and turn them on."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import (
    SharesHostWeights,
    SupportsClipSkip,
    SupportsMemoryControl,
    SupportsNoiseCheck,
    SupportsPrediction,
    SupportsPromptLimit,
    SupportsTextEncoderTraining,
    Use,
)
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.protocol import DiffusionPipeline


def check(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> None:
    """
    Raises:
        SettingsError: the settings need a capability that the pipeline lacks, or a dry run.
    """
    if settings.estimate_for is not None and not settings.dry_run:
        raise SettingsError(f"--estimate_for {settings.estimate_for}: only with --dry_run; this machine trains")
    needs = {
        "--quantize": (settings.quantize is not None, SupportsMemoryControl),
        "--gradient_checkpointing": (bool(settings.gradient_checkpointing), SupportsMemoryControl),
        "--train_batch_size auto": (settings.train_batch_size is None, SupportsMemoryControl),
        "--memory_limit": (settings.memory_limit is not None, SupportsMemoryControl),
        "--estimate_for": (settings.estimate_for is not None, SupportsMemoryControl),
        "--max_sequence_length": (settings.max_sequence_length is not None, SupportsPromptLimit),
        "--clip_skip": (settings.clip_skip is not None, SupportsClipSkip),
        "--train_text_encoder": (settings.train_text_encoder, SupportsTextEncoderTraining),
        "--masked_loss": (settings.masked_loss, SupportsPrediction),
        "--weighting_scheme": (settings.weighting_scheme is not None, SupportsPrediction),
        "--snr_gamma": (settings.snr_gamma is not None, SupportsNoiseCheck),
        "--noise_offset": (bool(settings.noise_offset), SupportsNoiseCheck),
        "--prior_preservation dop": (settings.prior_preservation == "dop", SupportsPrediction),
    }
    for flag, (requested, capability) in needs.items():
        if requested:
            require(pipeline, flag, capability)
    if settings.quantize is not None and isinstance(pipeline, SharesHostWeights):
        raise SettingsError(f"--quantize: {pipeline.name} is loaded already; load it quantized in its program")
    if isinstance(pipeline, SupportsClipSkip) and (settings.clip_skip or 0) > (most := pipeline.max_clip_skip):
        raise SettingsError(
            f"--clip_skip {settings.clip_skip}: pipeline {pipeline.name} leaves out at most {most} layers"
        )


def require(pipeline: DiffusionPipeline, flag: str, capability: Any) -> None:
    """
    Raises:
        SettingsError: the pipeline lacks the capability that a flag needs.
    """
    if isinstance(pipeline, capability):
        return
    lacking = checks.half_implemented(pipeline).get(capability.__name__)
    half = f" lacks {', '.join(lacking)}" if lacking else ""
    raise SettingsError(
        f"{flag}: pipeline {pipeline.name} does not offer it (capabilities.{capability.__name__}{half})"
    )


def check_sampling(pipeline: DiffusionPipeline, sampling: NoiseSampling | None) -> None:
    """
    Raises:
        SettingsError: the pipeline cannot draw or weight noise so.
    """
    if sampling is not None and isinstance(pipeline, SupportsNoiseCheck):
        pipeline.check_sampling(sampling)


def warnings(pipeline: DiffusionPipeline) -> list[str]:
    """One line if the pipeline has some members of a capability and lacks others: the capability is not used."""
    half = checks.half_implemented(pipeline)
    if not half:
        return []
    texts = [f"{name} lacks {', '.join(lacking)}" for name, lacking in half.items()]
    return [f"pipeline {pipeline.name} has capabilities in part, which are not used: {'; '.join(texts)}"]


def apply(pipeline: DiffusionPipeline, resolved: ResolvedSettings) -> None:
    """Turn the requested features on."""
    apply_to_images(
        pipeline,
        max_sequence_length=resolved.max_sequence_length,
        clip_skip=resolved.clip_skip,
        train_text_encoder=resolved.train_text_encoder,
        quantize=resolved.quantize,
    )
    if isinstance(pipeline, SupportsMemoryControl):
        pipeline.set_gradient_checkpointing(resolved.gradient_checkpointing)


def apply_to_images(
    pipeline: DiffusionPipeline,
    *,
    max_sequence_length: int | None,
    clip_skip: int | None,
    train_text_encoder: bool,
    quantize: int | None,
) -> None:
    """Turn on the requested ones of the features that change images; `check` or `require` has refused others."""
    if max_sequence_length is not None and isinstance(pipeline, SupportsPromptLimit):
        pipeline.prompt_limit = max_sequence_length
    if isinstance(pipeline, SupportsClipSkip):
        pipeline.clip_skip = clip_skip
    if isinstance(pipeline, SupportsTextEncoderTraining):
        pipeline.encode_text_in_step(train_text_encoder)
    if quantize is not None and isinstance(pipeline, SupportsMemoryControl):
        pipeline.quantize(quantize)


def release(pipeline: DiffusionPipeline, use: Use) -> None:
    """Free the memory of the parts that serve a use; they are loaded again on demand."""
    if isinstance(pipeline, SupportsMemoryControl):
        pipeline.release(use)


def skeleton_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The denoiser's layers for their names and shapes; weights are not loaded if the pipeline can avoid it."""
    return checks.skeleton(pipeline) if isinstance(pipeline, SupportsMemoryControl) else checks.denoiser(pipeline)


def update_host(pipeline: DiffusionPipeline) -> None:
    """Put the result into the object of another program that the pipeline shares weights with, if it does."""
    if isinstance(pipeline, SharesHostWeights):
        pipeline.update_host()
