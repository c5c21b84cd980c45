"""Folders of pipelines in diffusers' layout: read and write networks, tokenizers and recommended settings.

    model_index.json  recommended.json (this project's, optional)  scheduler/scheduler_config.json
    transformer/ or unet/  vae/  text_encoder/  ...    config.json and safetensors, one file or shards
    tokenizer/  ...                                    copied unchanged

`recommended.json` holds the fields of `Recommended`, if they differ from those of the published models. Folders saved
by mflux have no configurations; their weights lie in numbered shards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError
from mflux_vae.runtime.device import compute_dtype
from mflux_vae.runtime.threads import exclusive
from mflux_vae.weights.formats.files import (
    DTYPES,
    convert_safetensors,
    header,
    open_weights,
    read_folder,
    read_json,
    write_json,
)
from mflux_vae.weights.keymaps.diffusers import SAME_NAMES
from mflux_vae.weights.keymaps.rules import Tensors, from_mlx, load_strict
from mflux_vae_train.pipelines.loading.config_check import check_config
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.quantization import adopt_quantization

N = TypeVar("N", bound=nn.Module)

TEXT_STEM = "model"
"""transformers' name of a weights file, and mflux's of an index. diffusers' is `keymaps.diffusers.STEM`."""

RECOMMENDED = "recommended.json"


class PartialNetwork(nn.Module):
    """A network that needs a part of its file's tensors. The rest is saved with it, for other programs."""

    def __init__(self) -> None:
        super().__init__()
        self._rest: Mapping[str, mx.array] = MappingProxyType({})  # a dictionary would be parameters

    def is_needed(self, name: str) -> bool:
        """Whether a published tensor belongs to the network; also true of unknown ones."""
        raise NotImplementedError

    def take(self, tensors: Tensors) -> dict[str, mx.array]:
        """The needed tensors; keeps the others as they are, which are not loaded."""
        self._rest = MappingProxyType({name: one for name, one in tensors.items() if not self.is_needed(name)})
        return {name: tensor for name, tensor in tensors.items() if name not in self._rest}

    @property
    def rest(self) -> dict[str, mx.array]:
        """The other tensors of the file."""
        return dict(self._rest)


def saved_by_mflux(part: Path) -> bool:
    """Whether mflux wrote the folder of a part."""
    index = part / f"{TEXT_STEM}.safetensors.index.json"
    if index.is_file():
        metadata = read_json(index).get("metadata")
        return isinstance(metadata, dict) and "mflux_version" in metadata
    shard = part / "0.safetensors"
    return shard.is_file() and "mflux_version" in header(shard)[1]


def read_tensors(part: Path, stem: str, variant: str | None = None) -> dict[str, mx.array]:
    """Lazily read tensors of a part's folder, under the names in its files.

    Args:
        stem: name of the weights file without suffix, if mflux did not write it.
        variant: of the weights files, such as "fp16".

    Raises:
        WeightsError: no weights, or a broken file.
    """
    if not saved_by_mflux(part):
        return read_folder(part, stem, variant)
    if (part / f"{TEXT_STEM}.safetensors.index.json").is_file():
        return read_folder(part, TEXT_STEM)
    shards = sorted(part.glob("[0-9]*.safetensors"))  # releases of mflux that wrote no index
    return {name: tensor for shard in shards for name, tensor in read_file(shard).items()}


def read_file(file: Path) -> dict[str, mx.array]:
    """Lazily read tensors of one file."""
    return {name: stored.load() for name, stored in open_weights(file)[0].items()}


def fill(network: N, tensors: Tensors, source: Path, dtype: mx.Dtype | None) -> N:
    """`network` with these weights; layers that are stored quantized become quantized layers.

    Args:
        source: for messages.
        dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.

    Raises:
        WeightsError: names or shapes differ; all differences are listed.
    """
    if isinstance(network, PartialNetwork):
        tensors = network.take(tensors)
    ready = adopt_quantization(network, tensors, str(source))
    load_strict(network, ready, where=str(source), dtype=compute_dtype(dtype))
    return network


def save_network(network: Lazy[Any], folder: Path, stem: str, dtype: str) -> None:
    """Write a network's config.json and weights.

    Raises:
        SettingsError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"weights are stored as {', '.join(DTYPES)}, not {dtype!r}")
    module = network.borrow()
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    if isinstance(module, PartialNetwork):
        parameters |= module.rest
    config, tensors = module.config.to_dict(), from_mlx(parameters, SAME_NAMES)
    del module, parameters  # a network that was loaded for this is freed tensor by tensor
    with exclusive():
        convert_safetensors(folder / f"{stem}.safetensors", tensors, DTYPES[dtype])
    write_json(folder / "config.json", config)


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a folder, each whole or not at all. Copying a folder onto itself does nothing."""
    target.mkdir(parents=True, exist_ok=True)
    if target.samefile(source):
        return
    for file in sorted(source.iterdir()):
        if file.is_file():
            temporary = target / f".{file.name}.writing"
            shutil.copyfile(file, temporary)
            os.replace(temporary, target / file.name)


def read_recommended(folder: Path) -> Recommended | None:
    """Recommended settings stored in a pipeline's folder, if there are any.

    Raises:
        SettingsError, WeightsError: the file is broken, or has other fields than `Recommended`.
    """
    path = folder / RECOMMENDED
    if not path.is_file():
        return None
    fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in read_json(path).items()}
    try:
        recommended = check_config(lambda: Recommended(**fields), path)
        NoiseSampling(scheme=recommended.weighting_scheme or "uniform")
        return recommended
    except (TypeError, SettingsError) as error:
        raise SettingsError(f"{path}: not the fields of Recommended ({error})") from error
