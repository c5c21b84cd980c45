"""The adapter of a run: which layers it is for, where it begins, and what is known of it before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.export import check_result
from mflux_vae_train.dreambooth.optimization.trainable import kohya_names, skeletons
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.pipelines.capabilities import NamesForKohya, PresetsForLora, TrainsTextEncoder
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
    prefix, known = pipeline.adapter_prefix, skeletons(pipeline, settings)
    files = lora.read_adapter(settings.lora_weights, known, kohya_names(pipeline))
    if prefix not in files:
        raise WeightsError(f"{settings.lora_weights}: holds no adapter for {prefix!r}")
    file = files[prefix]
    for name, value in (("rank", file.rank), ("lora_alpha", file.alpha)):
        if getattr(settings, name) not in (None, value):
            raise SettingsError(
                f"--{name} is {getattr(settings, name):g}, and {settings.lora_weights} has {value:g}: leave it out"
            )
    if settings.use_dora and not file.dora:
        raise SettingsError(f"--use_dora: {settings.lora_weights} is an adapter without magnitudes")
    return replace(settings, rank=file.rank, lora_alpha=file.alpha, use_dora=file.dora)


def targets_of(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> dict[str, Sequence[str]]:
    """Patterns of the layers that are adapted, of each network.

    Raises:
        SettingsError: the pipeline has no such preset.
    """
    found = {pipeline.adapter_prefix: _of_denoiser(pipeline, settings)}
    if settings.train_text_encoder:
        assert isinstance(pipeline, TrainsTextEncoder)  # `fitting.check` refuses others
        found[pipeline.text_encoder_prefix] = pipeline.text_encoder_targets()
    return found


def _of_denoiser(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> Sequence[str]:
    if settings.lora_layers is None:
        return pipeline.lora_targets()
    presets = pipeline.lora_presets() if isinstance(pipeline, PresetsForLora) else {}
    if settings.lora_layers in USUAL_PRESETS and settings.lora_layers not in presets:
        known = ", ".join([*presets, lora.ALL_LAYERS])
        raise SettingsError(f"--lora_layers {settings.lora_layers}: {pipeline.name} has {known}; or name layers")
    return lora.patterns_of(settings.lora_layers, presets)


def described(pipeline: DiffusionPipeline, choices: ResolvedSettings) -> str:
    """What will be trained, in words.

    Raises:
        SettingsError: no layer matches, or --output_kohya_format cannot name one.
        WeightsError: the adapter to start from does not fit.
    """
    settings, networks = choices.settings, skeletons(pipeline, choices.settings)
    assert choices.rank is not None
    patterns, where = targets_of(pipeline, settings), ""
    if settings.lora_weights is not None:
        in_file = lora.check_adapter_fits(networks, settings.lora_weights, kohya_names(pipeline))
        patterns, where = {**patterns, **in_file}, f" from {settings.lora_weights}"
    for name in filter(str.strip, (settings.lora_layers or "").split(",")):  # each: one may be mistyped
        alone = targets_of(pipeline, replace(settings, lora_layers=name))
        lora.matching(networks[pipeline.adapter_prefix], alone[pipeline.adapter_prefix])
    matched = {prefix: lora.matching(network, patterns[prefix]) for prefix, network in networks.items()}
    if settings.output_kohya_format:
        if not isinstance(pipeline, NamesForKohya):
            raise SettingsError(f"--output_kohya_format: {pipeline.name} does not know the names")
        for prefix, paths in matched.items():
            lora.check_kohya(list(paths), kohya_names(pipeline)[prefix])
    size = choices.rank * sum(sum(paths.values()) for paths in matched.values())
    kind, more = ("DoRA", " and a magnitude per row") if settings.use_dora else ("LoRA", "")
    (_, first), *others = matched.items()
    layers = f"{len(first)} layers" + "".join(f" and {len(paths)} of {prefix}" for prefix, paths in others)
    if not where:
        where = f" ({', '.join(name for each in patterns.values() for name in _named(each, pipeline))})"
    return f"a {kind} of rank {choices.rank} on {layers}: {size:,} weights{more}{where}"


def _named(patterns: Sequence[str], pipeline: DiffusionPipeline) -> Sequence[str]:
    """The preset that has these patterns; themselves where none has."""
    presets = pipeline.lora_presets() if isinstance(pipeline, PresetsForLora) else {}
    return [name for name, its in presets.items() if set(its) == set(patterns)] or patterns


def attach(pipeline: DiffusionPipeline, networks: lora.Networks, choices: ResolvedSettings) -> None:
    """Adapts what is trained and freezes the rest of it.

    Raises:
        SettingsError: the weights, known only now, do not allow what the run is to leave.
    """
    settings, dropout = choices.settings, choices.settings.lora_dropout
    check_result(pipeline, settings, pipeline.denoiser)
    assert choices.rank is not None
    if (file := settings.lora_weights) is not None:
        lora.load_adapter(networks, file, kohya_names(pipeline), dropout=dropout, seed=settings.seed)
    for prefix, patterns in targets_of(pipeline, settings).items():
        if not lora.layers(networks[prefix]):
            lora.add_lora(
                networks[prefix],
                patterns,
                rank=choices.rank,
                alpha=choices.lora_alpha,
                dropout=dropout,
                dora=settings.use_dora,
                seed=settings.seed,
            )
