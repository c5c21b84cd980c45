"""The adapter of a run: which layers it is for, where it begins, and what is known of it before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mflux_vae.errors import SettingsError
from mflux_vae_train import lora
from mflux_vae_train.config import DreamBoothSettings
from mflux_vae_train.dreambooth.choices import Choices
from mflux_vae_train.dreambooth.fitting import outline_of
from mflux_vae_train.dreambooth.result import check_result
from mflux_vae_train.pipelines.capabilities import NamesForKohya, PresetsForLora
from mflux_vae_train.pipelines.protocol import DiffusionPipeline

USUAL_PRESETS = ("attention", "attention+mlp")


def as_in_file(settings: DreamBoothSettings, pipeline: DiffusionPipeline) -> DreamBoothSettings:
    """Settings in which rank, alpha and DoRA are those of the file that training starts from, where there is one.

    Raises:
        SettingsError: the user gave others.
        WeightsError: the file cannot be read, or holds no adapter for this kind of network.
    """
    if settings.lora_weights is None:
        return settings
    file = lora.read_adapter(settings.lora_weights, pipeline.adapter_prefix)
    for name, value in (("rank", file.rank), ("lora_alpha", file.alpha)):
        if getattr(settings, name) not in (None, value):
            raise SettingsError(
                f"--{name} is {getattr(settings, name):g}, and {settings.lora_weights} has {value:g}: leave it out"
            )
    if settings.use_dora and not file.dora:
        raise SettingsError(f"--use_dora: {settings.lora_weights} is an adapter without magnitudes")
    return replace(settings, rank=file.rank, lora_alpha=file.alpha, use_dora=file.dora)


def targets_of(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> Sequence[str]:
    """Patterns of the layers that are adapted.

    Raises:
        SettingsError: the pipeline has no such preset.
    """
    if settings.lora_layers is None:
        return pipeline.lora_targets()
    presets = pipeline.lora_presets() if isinstance(pipeline, PresetsForLora) else {}
    if settings.lora_layers in USUAL_PRESETS and settings.lora_layers not in presets:
        known = ", ".join([*presets, lora.EVERYTHING])
        raise SettingsError(f"--lora_layers {settings.lora_layers}: {pipeline.name} has {known}; or name layers")
    return lora.patterns_of(settings.lora_layers, presets)


def described(pipeline: DiffusionPipeline, choices: Choices) -> str:
    """What will be trained, in words.

    Raises:
        SettingsError: no layer matches, or --output_kohya_format cannot name one.
        WeightsError: the adapter to start from does not fit.
    """
    settings, network = choices.settings, outline_of(pipeline)
    assert choices.rank is not None
    if settings.lora_weights is None:
        patterns = targets_of(pipeline, settings)
        for name in filter(str.strip, (settings.lora_layers or "").split(",")):  # each: one may be mistyped
            lora.matching(network, targets_of(pipeline, replace(settings, lora_layers=name)))
        where = f"({', '.join(patterns)})"
    else:
        patterns = lora.check_adapter_fits(network, settings.lora_weights, pipeline.adapter_prefix)
        where = f"from {settings.lora_weights}"
    matched = lora.matching(network, patterns)
    if settings.output_kohya_format:
        if not isinstance(pipeline, NamesForKohya):
            raise SettingsError(f"--output_kohya_format: {pipeline.name} does not know the names")
        lora.check_kohya(list(matched), pipeline.kohya_naming().modules)
    size = choices.rank * sum(matched.values())
    kind, more = ("DoRA", " and a magnitude per row") if settings.use_dora else ("LoRA", "")
    return f"a {kind} of rank {choices.rank} on {len(matched)} layers: {size:,} weights{more} {where}"


def attach(pipeline: DiffusionPipeline, choices: Choices) -> None:
    """Adapts the denoiser and freezes the rest of it.

    Raises:
        SettingsError: the weights, known only now, do not allow what the run is to leave.
    """
    settings = choices.settings
    check_result(pipeline, settings, pipeline.denoiser)
    assert choices.rank is not None
    if settings.lora_weights is not None:
        path, prefix = Path(settings.lora_weights), pipeline.adapter_prefix
        lora.load_adapter(pipeline.denoiser, path, prefix, dropout=settings.lora_dropout, seed=settings.seed)
        return
    lora.add_lora(
        pipeline.denoiser,
        targets_of(pipeline, settings),
        rank=choices.rank,
        alpha=choices.lora_alpha,
        dropout=settings.lora_dropout,
        dora=settings.use_dora,
        seed=settings.seed,
    )
