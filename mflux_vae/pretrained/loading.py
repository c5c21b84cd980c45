"""Networks from what people have, and back: folders, pipelines, single files in any naming, presets, the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.call_log import log
from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.networks.laq import LatentActionQuantizer
from mflux_vae.pretrained import detect
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
    find,
    settings_of,
)
from mflux_vae.runtime.device import compute_dtype
from mflux_vae.runtime.threads import portable
from mflux_vae.weights.formats.files import DTYPES, write_json, write_safetensors
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import from_mlx, load_strict, to_mlx

_BESIDE = ("running_mean", "running_var", "num_batches_tracked", "beta", "kl_div")
"""What is stored besides parameters, by norms for the most part."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a file or folder holds.

    Attributes:
        source: file or folder.
        family: class name of the network.
        naming: of its keys: `diffusers`, `compvis`, `bfl` or `taesd`.
        config: as in a config.json.
        tensors, parameters: how many.
        dtypes: of the tensors, as stored.
        preset: the known autoencoder that it equals in architecture and scaling, or None.
        assumed: what a file does not say and was taken for granted, as one sentence, or None.
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
    """Open an autoencoder, in evaluation: dropout is off, batch norms use what they stored.

    Args:
        source: one of
            - a folder in diffusers' layout (`config.json`, `diffusion_pytorch_model.safetensors`), or a pipeline's,
              which has one named `vae`;
            - a .safetensors, .ckpt, .pt, .pth, .bin or .npz file in the naming of diffusers, CompVis, Black Forest
              Labs, TAESD, LAPA or MLX's example, also a whole model's with the autoencoder in it; of TAESD, one half,
              beside which the other lies;
            - the name of a preset (see `opening.presets`), or `owner/name` on the hub, which is downloaded.
        dtype: to compute in, if not on a CPU, which always takes float32; None for bfloat16. A network whose
            configuration says that it overflows in float16 (`force_upcast`) takes float32 instead of that.
        config: what to take the file for, where it does not say or says it wrong: a preset's name; a config.json; a
            YAML file or dictionary with latent-diffusion's `ddconfig`. A single file leaves the scaling of latents open
            and is otherwise recognised by its keys, shapes and name; what had to be assumed is logged as a warning.
        pairs: take a network for pairs of frames (`LatentActionQuantizer`), too, and not only one for images.

    Raises:
        WeightsError: files are missing or broken, of an unknown kind, or do not fit the configuration; it is for pairs
            of frames and was not asked for.
        SettingsError: the configuration asks for what the network does not have.
    """
    opened = find(source, config)
    if opened.assumed:
        log.warning("%s", opened.assumed)
    network: Any = _built(opened)
    if isinstance(network, LatentActionQuantizer) and not pairs:
        what = f"a {opened.family}, which takes pairs of frames and not images"
        raise WeightsError(f"{opened.where}: {what}; mflux-vae compare takes it")
    tensors = to_mlx({name: stored.load() for name, stored in opened.tensors.items()}, opened.rules)
    load_strict(network, _complete(tensors, network), where=opened.where, dtype=_dtype(network, dtype))
    return network.eval()


def new_network(config: Config) -> nn.Module:
    """An untrained network, drawn from MLX's global random state.

    Args:
        config: a preset's name; a config.json; a YAML file or dictionary with latent-diffusion's `ddconfig`.

    Raises:
        WeightsError: it is of an unknown kind.
        SettingsError: it cannot be read, or asks for what the network does not have.
    """
    told = settings_of(config)
    return FAMILIES[family_of(told, str(config))].build(told)


def _built(opened: Located) -> nn.Module:
    """Its network, untrained; errors say where the configuration is from."""
    try:
        return FAMILIES[opened.family].build(opened.config)
    except SettingsError as error:
        raise SettingsError(f"{opened.where}: {error}") from error


def describe(source: Source, *, config: Config | None = None) -> Description:
    """What `open_network` would open, without reading its tensors. Arguments and errors as there."""
    opened = find(source, config)
    stored = opened.tensors.values()
    return Description(
        source=opened.where,
        family=opened.family,
        naming=opened.naming,
        config=opened.config,
        tensors=len(stored),
        parameters=sum(
            prod(tensor.shape) for name, tensor in opened.tensors.items() if name.split(".")[-1] not in _BESIDE
        ),
        dtypes=tuple(sorted({tensor.dtype for tensor in stored})),
        preset=opened.preset or equal_preset(opened),
        assumed=opened.assumed,
    )


def parameter_count(network: nn.Module) -> int:
    """Numbers that training finds; not the statistics of norms."""
    tensors = dict(tree_flatten(network.parameters()))
    return sum(tensor.size for name, tensor in tensors.items() if name.split(".")[-1] not in _BESIDE)


def save_network(network: nn.Module, folder: Source, dtype: str = "float32") -> None:
    """Write the folder that `open_network` opens, and diffusers too where it has such a network.

    Args:
        folder: made where it is missing; or a file that ends in .safetensors, which then knows its configuration.
        dtype: of the stored weights: float32, float16 or bfloat16.

    Raises:
        SettingsError: another dtype, or another kind of file.
        WeightsError: a network of a kind that `open_network` does not know.
    """
    config = network.config.to_dict()
    family = FAMILIES[family_of(config, str(folder))]
    parameters = dict(tree_flatten(network.parameters()))
    tensors = _cast(from_mlx(parameters, family.rules("diffusers", parameters)), dtype)
    _write(Path(folder), tensors, config, "diffusers")


def convert(
    source: Source, target: Source, naming: str, dtype: str | None = None, *, config: Config | None = None
) -> list[Path]:
    """Write an autoencoder's weights under other names and in other layouts; there and back is bitwise the same.

    Args:
        source, config: see `open_network`.
        target: a file that ends in .safetensors, which then knows its configuration; or a folder: in diffusers' layout,
            or with TAESD's two halves.
        naming: `diffusers`, `compvis`, `bfl` or `taesd`.
        dtype: float32, float16 or bfloat16; None keeps what is stored.

    Returns:
        the files that were written.

    Raises:
        SettingsError: the kind of network has no such naming, or that naming is not for such a network or not one of
            folders; another dtype.
        WeightsError: as `open_network`.
    """
    opened, target = find(source, config), Path(target)
    family = FAMILIES[opened.family]
    if naming not in family.tables:
        raise SettingsError(f"{opened.family} has the namings {', '.join(family.tables)}, not {naming!r}")
    ours = to_mlx({name: stored.load() for name, stored in opened.tensors.items()}, opened.rules)
    network = _built(opened)
    load_strict(network, _complete(ours, network), where=opened.where)  # what does not fit is told before it is written
    if naming in detect.ONE_NETWORK:
        _same_network(network.config.to_dict(), naming, ours, opened.where)
    tensors = from_mlx(ours, family.rules(naming, ours))
    return _write(target, tensors if dtype is None else _cast(tensors, dtype), opened.config, naming)


def _same_network(config: Mapping[str, Any], naming: str, tensors: Mapping[str, mx.array], where: str) -> None:
    """Refuses a network that whoever reads this naming would take for another one."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    read = detect.settings(str(config["_class_name"]), naming, shapes, where)
    if wrong := [f"{name} {config[name]}" for name in read if read[name] != config[name]]:
        raise SettingsError(f"{where}: {naming} naming is not for a network with {', '.join(wrong)}")


def _write(target: Path, tensors: dict[str, mx.array], config: Mapping[str, Any], naming: str) -> list[Path]:
    if target.suffix == ".safetensors":
        write_safetensors(target, tensors, {CONFIG_KEY: json.dumps(config)})
        return [target]
    if target.is_file():
        raise SettingsError(f"{target} is a file: give a folder, or a name that ends in .safetensors")
    if naming == "diffusers":
        files = [target / f"{STEM}.safetensors", target / "config.json"]
        write_safetensors(files[0], tensors)
        write_json(files[1], config)
        return files
    if naming != "taesd":
        raise SettingsError(f"{target}: files in {naming}'s naming are single ones; let its name end in .safetensors")
    files = [target / f"taesd_{half}.safetensors" for half in HALVES]
    for half, file in zip(HALVES, files, strict=True):
        part = {name.removeprefix(f"{half}."): tensor for name, tensor in tensors.items() if name.startswith(half)}
        write_safetensors(file, part, {CONFIG_KEY: json.dumps(config)})
    return files


def _cast(tensors: Mapping[str, mx.array], dtype: str) -> dict[str, mx.array]:
    if dtype not in DTYPES:
        raise SettingsError(f"weights are stored as {', '.join(DTYPES)}, not {dtype!r}")
    return {
        name: tensor.astype(DTYPES[dtype]) if mx.issubdtype(tensor.dtype, mx.floating) else tensor
        for name, tensor in tensors.items()
    }


def _complete(tensors: Mapping[str, mx.array], network: nn.Module) -> dict[str, mx.array]:
    """With FLUX.2's counter of batches, which not every file has and nothing uses."""
    counted = COUNTER in dict(tree_flatten(network.parameters()))
    return {**({COUNTER: mx.array(0, mx.int64)} if counted else {}), **tensors}


def _dtype(network: Any, asked: mx.Dtype | None) -> mx.Dtype:
    dtype = compute_dtype(asked)
    overflows = dtype == mx.float16 and network.config.force_upcast
    return mx.float32 if overflows else dtype
