"""What a run trains: the layers that the adapter changes, or all weights."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mlx.nn as nn
from mlx.utils import tree_map, tree_reduce

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.utils.formatting import count_text
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.export import check_can_fuse, check_single_file, saves_itself
from mflux_vae_train.dreambooth.optimization.trainable import adapter_names, kohya_names, skeletons
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.lora.targets import dimensions, linears
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import SupportsAdapterExport, SupportsTextEncoderTraining
from mflux_vae_train.pipelines.protocol import DiffusionPipeline

COMMON_PRESETS = ("attention", "attention+mlp")


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """
    Attributes:
        targets: patterns of the adapted layers by network prefix; empty with ``--train_mode full``.
        weights: number of trained weights, without DoRA's magnitudes.
        shapes: shapes of the trained arrays by name in a checkpoint; None if all weights are trained.
        alphas: by prefix and path, of the layers of a given adapter; empty if all layers have rank and alpha of the
            settings.
        description: for the log.
    """

    targets: Mapping[str, Sequence[str]]
    weights: int
    shapes: Mapping[str, tuple[int, ...]] | None
    alphas: Mapping[str, float]
    description: str


def with_adapter_settings(
    settings: DreamBoothSettings, pipeline: DiffusionPipeline
) -> tuple[DreamBoothSettings, Sequence[str]]:
    """Settings with the file that ``--lora_weights`` names, and its rank, alpha and DoRA, if it is given; warnings.

    Raises:
        SettingsError: they contradict the given ones.
        WeightsError: the file cannot be read, or holds no adapter for this kind of network.
    """
    if settings.lora_weights is None:
        return settings, ()
    prefix, path = pipeline.adapter_prefix, lora.adapter_file(settings.lora_weights)
    with _naming("--lora_weights"):
        files = lora.read_adapter(path, skeletons(pipeline, settings), adapter_names(pipeline))
        if prefix not in files:
            raise WeightsError(f"{path}: holds no adapter for {prefix!r}")
    file, warnings = files[prefix], []
    unstated = sum(one.unstated for one in files.values())
    alpha = file.alpha if settings.lora_alpha is None or not file.unstated else settings.lora_alpha
    if unstated and settings.lora_alpha is None:
        whose = "" if unstated == sum(len(one.ranks) for one in files.values()) else f" of {unstated} layers"
        warnings.append(
            f"{path}: alpha{whose} is not stated, assuming the rank (scale 1); give --lora_alpha to override"
        )
    for name, value in (("rank", file.rank), ("lora_alpha", alpha)):
        if getattr(settings, name) not in (None, value):
            raise SettingsError(f"--{name} is {getattr(settings, name):g}, and {path} has {value:g}: leave it out")
    if settings.use_dora and not file.dora:
        raise SettingsError(f"--use_dora: {path} is an adapter without magnitudes")
    settings = replace(settings, lora_weights=str(path), rank=file.rank, lora_alpha=alpha, use_dora=file.dora)
    return settings, warnings


def read_assistant(
    pipeline: DiffusionPipeline, settings: DreamBoothSettings
) -> tuple[lora.Adapter | None, Sequence[str]]:
    """The adapter that ``--assistant_lora`` names, and warnings. A dry run does not download it.

    Raises:
        WeightsError: the file cannot be read, or holds no adapter that can assist this network.
    """
    if (source := settings.assistant_lora) is None:
        return None, ()
    prefix, denoiser = pipeline.adapter_prefix, skeletons(pipeline, settings)[pipeline.adapter_prefix]
    with _naming("--assistant_lora"):
        if (path := lora.fetch_adapter(source, download=not settings.dry_run)) is None:
            return None, (f"--assistant_lora {source}: not downloaded, and in no estimate",)
        adapter = lora.read_assistant(path, prefix, denoiser, adapter_names(pipeline))
    unstated = f"{path}: alpha is not stated, assuming the rank (scale 1)"
    return adapter, (unstated,) if adapter.unstated else ()


@contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Begin messages about an adapter's file with the flag that names it."""
    try:
        yield
    except WeightsError as error:
        raise type(error)(f"{flag}: {error}") from error


def plan_trainable(pipeline: DiffusionPipeline, resolved: ResolvedSettings) -> Trainable:
    """
    Raises:
        SettingsError: the pipeline carries an adapter already, no layer matches, the pipeline has no such preset,
            or ``--fuse``, ``--fuse_single_file`` or ``--output_kohya_format`` cannot write the result.
        WeightsError: the adapter to start from does not fit.
    """
    check_single_file(pipeline, resolved)
    networks = skeletons(pipeline, resolved)
    denoiser = networks[pipeline.adapter_prefix]
    if any(map(lora.layers, networks.values())):
        raise SettingsError(f"pipeline {pipeline.name} carries an adapter already: open it anew to train another")
    if resolved.rank is None:
        if len(networks) > 1 and not saves_itself(pipeline):
            raise SettingsError(f"--train_text_encoder: a {type(pipeline).__name__} cannot save its text encoders")
        parameters = [network.parameters() for network in networks.values()]
        weights = tree_reduce(operator.add, tree_map(lambda array: array.size, parameters), 0)
        of_what = f" of {' and '.join(networks)}" if len(networks) > 1 else ""
        description = f"all {weights:,} weights{of_what}"
        return Trainable(targets={}, weights=weights, shapes=None, alphas={}, description=description)
    check_can_fuse(pipeline, resolved, denoiser)
    names = kohya_names(pipeline)
    targets = {pipeline.adapter_prefix: _denoiser_targets(pipeline, resolved.lora_layers)}
    if resolved.train_text_encoder:
        assert isinstance(pipeline, SupportsTextEncoderTraining)  # `pipeline_features.check` refuses others
        targets |= pipeline.text_encoder_targets()
    for name in filter(str.strip, (resolved.lora_layers or "").split(",")):  # each one alone: one may be mistyped
        _check_matches(pipeline, denoiser, name.strip())
    ranks: Mapping[str, Mapping[str, int]] = {}
    alphas: Mapping[str, float] = {}
    origin = f" ({', '.join(name for each in targets.values() for name in _preset_names(each, pipeline))})"
    if resolved.lora_weights is not None:
        names_read, scale = adapter_names(pipeline), _scale(resolved)
        files = lora.check_adapter_fits(networks, resolved.lora_weights, names_read, scale=scale)
        ranks = {prefix: file.ranks for prefix, file in files.items()}
        targets |= {prefix: list(of_layers) for prefix, of_layers in ranks.items()}
        every_rank = {rank for file in files.values() for rank in file.ranks.values()}
        alphas = {f"{prefix}.{path}": alpha for prefix, file in files.items() for path, alpha in file.alphas.items()}
        if every_rank == {resolved.rank} and {*alphas.values()} == {resolved.lora_alpha}:
            alphas = {}
        origin = f" from {resolved.lora_weights}"
    matched = {prefix: lora.matching(network, targets[prefix]) for prefix, network in networks.items()}
    if resolved.output_kohya_format:
        if not isinstance(pipeline, SupportsAdapterExport):
            raise SettingsError(f"--output_kohya_format: {pipeline.name} does not know the names")
        for prefix, paths in matched.items():
            lora.check_kohya(list(paths), names[prefix])
    weights = sum(
        ranks.get(prefix, {}).get(path, resolved.rank) * size
        for prefix, paths in matched.items()
        for path, size in paths.items()
    )
    all_ranks = sorted({resolved.rank, *(rank for of_layers in ranks.values() for rank in of_layers.values())})
    rank = f"rank {resolved.rank}" if len(all_ranks) == 1 else f"ranks {all_ranks[0]} to {all_ranks[-1]}"
    kind, magnitudes = ("DoRA", " and a magnitude per row") if resolved.use_dora else ("LoRA", "")
    (_, first), *others = matched.items()
    layers = count_text(len(first), "layer") + "".join(f" and {len(paths)} of {prefix}" for prefix, paths in others)
    description = f"a {kind} of {rank} on {layers}: {weights:,} weights{magnitudes}{origin}"
    shapes = _shapes(networks, matched, resolved, ranks)
    return Trainable(targets=targets, weights=weights, shapes=shapes, alphas=alphas, description=description)


def _shapes(
    networks: lora.Networks,
    matched: Mapping[str, Mapping[str, int]],
    resolved: ResolvedSettings,
    ranks: Mapping[str, Mapping[str, int]],
) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's arrays by name in a checkpoint, see `trainable.combined`."""
    assert resolved.rank is not None
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, paths in matched.items():
        layers = linears(networks[prefix])
        for path in paths:
            outputs, inputs = dimensions(layers[path])
            name = "/".join(["denoiser", *([prefix] if len(networks) > 1 else []), *path.split(".")])
            rank = ranks.get(prefix, {}).get(path, resolved.rank)
            shapes |= {f"{name}/lora_a": (inputs, rank), f"{name}/lora_b": (rank, outputs)}
            if resolved.use_dora:
                shapes[f"{name}/m"] = (outputs,)
    return shapes


def _denoiser_targets(pipeline: DiffusionPipeline, lora_layers: str | None) -> Sequence[str]:
    if lora_layers is None:
        return checks.lora_targets(pipeline)
    presets = _presets(pipeline)
    if lora_layers in COMMON_PRESETS and lora_layers not in presets:
        known = ", ".join([*presets, lora.ALL_LAYERS])
        raise SettingsError(f"--lora_layers {lora_layers}: {pipeline.name} has {known}; or name layers")
    return lora.patterns_of(lora_layers, presets)


def _check_matches(pipeline: DiffusionPipeline, denoiser: nn.Module, name: str) -> None:
    """Refuse a preset, name or pattern that no layer matches."""
    try:
        lora.matching(denoiser, _denoiser_targets(pipeline, name))
    except SettingsError:
        if name not in _presets(pipeline):
            raise
        raise SettingsError(f"--lora_layers {name}: {pipeline.name} has no layers of this preset") from None


def _presets(pipeline: DiffusionPipeline) -> Mapping[str, Sequence[str]]:
    return pipeline.lora_presets() if isinstance(pipeline, SupportsAdapterExport) else {}


def _preset_names(patterns: Sequence[str], pipeline: DiffusionPipeline) -> Sequence[str]:
    """The preset with these patterns; the patterns themselves if there is none."""
    return [name for name, its in _presets(pipeline).items() if set(its) == set(patterns)] or patterns


def attach(
    pipeline: DiffusionPipeline,
    networks: lora.Networks,
    resolved: ResolvedSettings,
    targets: Mapping[str, Sequence[str]],
) -> None:
    """Add the adapter to the networks and freeze everything else.

    Raises:
        SettingsError: ``--fuse``, and the loaded weights turn out to be quantized.
    """
    assert resolved.rank is not None and resolved.lora_alpha is not None
    check_can_fuse(pipeline, resolved, pipeline.denoiser)
    dropout, seed = resolved.lora_dropout, resolved.seed
    if (file := resolved.lora_weights) is not None:
        names = adapter_names(pipeline)
        lora.load_adapter(networks, file, names, dropout=dropout, seed=seed, scale=_scale(resolved))
    for prefix, patterns in targets.items():
        network = networks[prefix]
        if not lora.layers(network):
            rank, alpha = resolved.rank, resolved.lora_alpha
            lora.add_lora(network, patterns, rank=rank, alpha=alpha, dropout=dropout, dora=resolved.use_dora, seed=seed)


def _scale(resolved: ResolvedSettings) -> float:
    """Scale of layers whose alpha the given adapter does not state."""
    assert resolved.rank is not None and resolved.lora_alpha is not None
    return resolved.lora_alpha / resolved.rank
