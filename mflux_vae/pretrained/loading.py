"""Open, save and convert networks: folders, pipelines, single files in any key naming, presets, the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.call_log import log
from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.networks.laq import LatentActionQuantizer
from mflux_vae.networks.video.wan import AutoencoderKLWan
from mflux_vae.pretrained import detect, presets
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.pretrained.locate import (
    CONFIG_KEY,
    COUNTER,
    HALVES,
    Config,
    Located,
    Source,
    equal_preset,
    family_of,
    locate,
    not_downloaded,
    settings_of,
)
from mflux_vae.pretrained.presets import Preset
from mflux_vae.runtime.device import compute_dtype
from mflux_vae.runtime.threads import portable
from mflux_vae.weights.formats.files import DTYPES, write_json, write_safetensors
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import from_mlx, load_strict, to_mlx
from mflux_vae.weights.keymaps.wan import with_time_convolutions

_NOT_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked", "beta", "kl_div")
"""LazyTensor tensors that are not parameters, such as the statistics of norms."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """Content of a file or folder.

    Attributes:
        source: file or folder.
        family: class name of the network.
        naming: key naming: `diffusers`, `compvis`, `bfl`, `taesd`, ...
        config: content of a config.json.
        tensors, parameters: counts.
        dtypes: stored dtypes; empty for a published autoencoder that is not downloaded.
        preset: preset with the same architecture and scaling, or registered for this folder, or None.
        assumed: a sentence about what the file does not specify, or None.
    """

    source: str
    family: str
    naming: str
    config: dict[str, Any]
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    preset: str | None
    assumed: str | None


@portable()
def open_network(
    source: Source, dtype: mx.Dtype | None = None, *, config: Config | None = None, pairs: bool = False
) -> nn.Module:
    """Open an autoencoder in evaluation mode.

    Args:
        source: one of
            - a folder in diffusers' layout (`config.json`, `diffusion_pytorch_model.safetensors`), or a pipeline folder
              with a subfolder `vae`;
            - a .safetensors, .ckpt, .pt, .pth, .bin or .npz file in the key naming of diffusers, CompVis, Black Forest
              Labs, Wan, TAESD, TAEHV, LAPA or MLX's example, alone or inside a whole model; for TAESD either half, with
              the other beside it;
            - a preset (`pretrained.presets`), or `owner/name` on the hub, which is downloaded.
        dtype: dtype of the weights on GPUs (None: float32; float32 instead of float16 if the configuration has
            `force_upcast`). Activations of images are float32 on every device; CPUs always have float32 weights, too.
        config: configuration of a file that has none or a wrong one: a preset, a config.json, or a YAML file or
            dictionary with a `ddconfig` of latent-diffusion. Without it a single file is detected by keys, shapes and
            name; assumptions about its latent scaling are logged as a warning.
        pairs: also open networks for pairs of frames (`LatentActionQuantizer`).

    Raises:
        WeightsError: files are missing, broken, of an unknown kind, or do not fit the configuration; a network for
            pairs without `pairs`.
        SettingsError: an unsupported configuration.
    """
    opened = locate(source, config)
    if opened.assumed:
        log.warning("%s", opened.assumed)
    network: Any = _build(opened)
    if isinstance(network, LatentActionQuantizer) and not pairs:
        raise WeightsError(
            f"{opened.where} is a {opened.family} for pairs of frames, not for images; use mflux-vae compare"
        )
    tensors = to_mlx({name: stored.load() for name, stored in opened.tensors.items()}, opened.rules)
    load_strict(network, _complete(tensors, network), where=opened.where, dtype=_dtype(network, dtype))
    return network.eval()


def new_network(config: Config) -> nn.Module:
    """Build an untrained network, initialised from MLX's global random state.

    Args:
        config: a preset, a config.json, or a YAML file or dictionary with a `ddconfig` of latent-diffusion.

    Raises:
        WeightsError: an unknown kind of network.
        SettingsError: the configuration cannot be read or is not supported.
    """
    settings = settings_of(config)
    return FAMILIES[family_of(settings, str(config))].build(settings)


def _build(opened: Located) -> nn.Module:
    """Build the untrained network; errors name the file."""
    try:
        return FAMILIES[opened.family].build(opened.config)
    except SettingsError as error:
        raise SettingsError(f"{opened.where}: {error}") from error


def describe(source: Source, *, config: Config | None = None) -> Description:
    """Describe a source without reading its tensors. Arguments and errors as in `open_network`.

    A published autoencoder is described by its known configuration; nothing is downloaded.
    """
    if config is None and (preset := not_downloaded(source)) is not None:
        return _describe_preset(preset, str(source))
    opened = locate(source, config)
    stored = opened.tensors.values()
    return Description(
        source=opened.where,
        family=opened.family,
        naming=opened.naming,
        config=opened.config,
        tensors=len(stored),
        parameters=sum(
            prod(tensor.shape) for name, tensor in opened.tensors.items() if name.split(".")[-1] not in _NOT_PARAMETERS
        ),
        dtypes=tuple(sorted({tensor.dtype for tensor in stored})),
        preset=opened.preset or equal_preset(opened) or presets.registered_name(opened.where),
        assumed=opened.assumed,
    )


def _describe_preset(preset: Preset, source: str) -> Description:
    network = FAMILIES[preset.family].network(preset.config)
    return Description(
        source=preset.repository if presets.find(source) else source,
        family=preset.family,
        naming="diffusers",
        config=preset.config.to_dict(),
        tensors=len(dict(tree_flatten(network.parameters()))),
        parameters=parameter_count(network),
        dtypes=(),
        preset=preset.name,
        assumed=None,
    )


def parameter_count(network: nn.Module) -> int:
    """Number of trainable values; statistics of norms do not count."""
    tensors = dict(tree_flatten(network.parameters()))
    return sum(tensor.size for name, tensor in tensors.items() if name.split(".")[-1] not in _NOT_PARAMETERS)


def save_network(network: nn.Module, folder: Source, dtype: str = "float32") -> None:
    """Write a folder for `open_network`; diffusers opens it if it has such a network.

    Of `AutoencoderKLWan`, which has no weights for past frames, zeros are written in their place, with a warning.

    Args:
        folder: created if missing; or a .safetensors file, with the configuration in its metadata.
        dtype: float32, float16 or bfloat16.

    Raises:
        SettingsError: another dtype or kind of file.
        WeightsError: `open_network` does not know this kind of network.
    """
    config = network.config.to_dict()
    family = FAMILIES[family_of(config, str(folder))]
    parameters = dict(tree_flatten(network.parameters()))
    tensors = _cast(from_mlx(parameters, family.rules("diffusers", parameters)), dtype)
    if isinstance(network, AutoencoderKLWan):
        _warn_once(f"{folder}: written for single images: the weights for past frames are zero")
        tensors = with_time_convolutions(tensors, network.config.temperal_downsample)
    _write(_files(Path(folder), "diffusers"), tensors, config)


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def convert(
    source: Source,
    target: Source,
    naming: str,
    dtype: str | None = None,
    *,
    config: Config | None = None,
    overwrite: bool = True,
) -> list[Path]:
    """Convert the weights of an autoencoder to another key naming. Converting back gives the same bits.

    Args:
        source, config: see `open_network`.
        target: a .safetensors file, with the configuration in its metadata; or a folder, in diffusers' layout or with
            the two halves of TAESD.
        naming: `diffusers`, `compvis`, `bfl`, `wan` or `taesd`.
        dtype: float32, float16 or bfloat16; None: unchanged.
        overwrite: replace existing files.

    Returns:
        written files.

    Raises:
        SettingsError: the naming does not exist for this network or for folders; another dtype; a file exists that may
            not be replaced.
        WeightsError: as `open_network`.
    """
    opened, target = locate(source, config), Path(target)
    family = FAMILIES[opened.family]
    if naming not in family.tables:
        raise SettingsError(f"{opened.family} has no naming {naming!r}; known: {', '.join(family.tables)}")
    files = _files(target, naming)
    if not overwrite and (taken := [file for file in files if file.exists()]):
        raise SettingsError(f"{taken[0]} exists; give --overwrite (overwrite=True), or another name")
    ours = to_mlx({name: stored.load() for name, stored in opened.tensors.items()}, opened.rules)
    network = _build(opened)
    load_strict(network, _complete(ours, network), where=opened.where)  # checks the tensors before anything is written
    if naming in detect.ONE_NETWORK:
        _same_network(network.config.to_dict(), naming, ours, opened.where)
    if family.unused:
        stored = {name: stored.load() for name, stored in opened.tensors.items()}
        renamed = to_mlx(stored, family.renaming(opened.naming, stored))
        tensors = from_mlx(renamed, family.renaming(naming, renamed))
    else:
        tensors = from_mlx(ours, family.rules(naming, ours))
    _write(files, tensors if dtype is None else _cast(tensors, dtype), opened.config)
    return files


def _same_network(config: Mapping[str, Any], naming: str, tensors: Mapping[str, mx.array], where: str) -> None:
    """Refuse a network that readers of this naming would mistake for another one."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    read = detect.settings(str(config["_class_name"]), naming, shapes, where)
    if wrong := [f"{name} {config[name]}" for name in read if read[name] != config[name]]:
        raise SettingsError(f"{where}: naming {naming} cannot express a network with {', '.join(wrong)}")


def _files(target: Path, naming: str) -> list[Path]:
    """Files to write: one for all; weights and configuration; or one for each half."""
    if target.suffix == ".safetensors":
        return [target]
    if target.is_file():
        raise SettingsError(f"{target} is a file; give a folder or a .safetensors file")
    if naming == "diffusers":
        return [target / f"{STEM}.safetensors", target / "config.json"]
    if naming != "taesd":
        raise SettingsError(f"{target}: naming {naming} needs a single file; give a name that ends in .safetensors")
    return [target / f"taesd_{half}.safetensors" for half in HALVES]


def _write(files: Sequence[Path], tensors: dict[str, mx.array], config: Mapping[str, Any]) -> None:
    if len(files) == 1:
        write_safetensors(files[0], tensors, {CONFIG_KEY: json.dumps(config)})
    elif files[1].suffix == ".json":
        write_safetensors(files[0], tensors)
        write_json(files[1], config)
    else:
        for half, file in zip(HALVES, files, strict=True):
            part = {name.removeprefix(f"{half}."): tensor for name, tensor in tensors.items() if name.startswith(half)}
            write_safetensors(file, part, {CONFIG_KEY: json.dumps(config)})


def _cast(tensors: Mapping[str, mx.array], dtype: str) -> dict[str, mx.array]:
    if dtype not in DTYPES:
        raise SettingsError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    return {
        name: tensor.astype(DTYPES[dtype]) if mx.issubdtype(tensor.dtype, mx.floating) else tensor
        for name, tensor in tensors.items()
    }


def _complete(tensors: Mapping[str, mx.array], network: nn.Module) -> dict[str, mx.array]:
    """Add FLUX.2's unused batch counter, which some files lack, and remove what single images do not use."""
    counted = COUNTER in dict(tree_flatten(network.parameters()))
    used = FAMILIES[family_of(network.config.to_dict(), "")].used
    tensors = {name: tensor for name, tensor in tensors.items() if used(name)}
    return {**({COUNTER: mx.array(0, mx.int64)} if counted else {}), **tensors}


def _dtype(network: Any, requested: mx.Dtype | None) -> mx.Dtype:
    dtype = compute_dtype(requested or mx.float32)
    overflows = dtype == mx.float16 and network.config.force_upcast
    return mx.float32 if overflows else dtype
