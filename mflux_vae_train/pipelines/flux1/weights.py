"""The weights of each part of a FLUX.1 folder, whoever wrote it, as a network of ours.

diffusers' layout, sharded or not; Black Forest Labs' single file for the transformer, where there is no `transformer/`;
mflux's saves; and any of them with layers that MLX quantised. Tensors are read when they are first computed with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import WeightsError
from mflux_vae.pretrained.loading import new_network, open_network
from mflux_vae.runtime.device import compute_dtype
from mflux_vae.vae import VAE
from mflux_vae.weights.formats.files import header, open_weights, read_folder, read_json
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import Tensors, load_strict, to_mlx
from mflux_vae_train.pipelines import quantization
from mflux_vae_train.pipelines.flux1 import keys
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig
from mflux_vae_train.pipelines.text import clip, t5

N = TypeVar("N", bound=nn.Module)

TEXT_STEM = "model"
"""transformers' name of a weights file, and mflux's of an index; diffusers' is `STEM`."""

_SINGLE_FILES = {"transformer": ("flux1-*.safetensors",), "vae": ("ae.safetensors",)}
"""Black Forest Labs' names, `flux1-schnell.safetensors` and `flux1-dev.safetensors` among them."""

_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\..*")


def transformer(
    place: Path, config: FluxTransformerConfig, dtype: mx.Dtype | None = None, variant: str | None = None
) -> FluxTransformer:
    """Open the transformer of a pipeline's folder, or in a file of its own.

    Args:
        place: the folder, or the file.
        config: of the network that is built.
        dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
        variant: of the weights files, such as "fp16".

    Raises:
        WeightsError: no weights are there, or they are not this network's; all differences are listed.
    """
    source, tensors = _transformer_tensors(place, variant)
    return _filled(FluxTransformer(config), tensors, source, dtype)


def text_encoder(
    folder: Path, config: clip.CLIPTextConfig, dtype: mx.Dtype | None = None, variant: str | None = None
) -> clip.CLIPTextModel:
    """Open CLIP. Arguments and errors as `transformer`."""
    place = folder / "text_encoder"
    tensors = clip.published_names(_tensors(place, TEXT_STEM, variant))
    return _filled(clip.CLIPTextModel(config), tensors, place, dtype)


def text_encoder_2(
    folder: Path, config: t5.T5Config, dtype: mx.Dtype | None = None, variant: str | None = None
) -> t5.T5Encoder:
    """Open T5. Arguments and errors as `transformer`."""
    place = folder / "text_encoder_2"
    tensors = t5.published_names(to_mlx(_tensors(place, TEXT_STEM, variant), keys.MFLUX_T5))
    return _filled(t5.T5Encoder(config), tensors, place, dtype)


def autoencoder(
    folder: Path, config: Mapping[str, Any], dtype: mx.Dtype | None = None, variant: str | None = None
) -> VAE:
    """Open the autoencoder. Arguments and errors as `transformer`."""
    place = folder / "vae"
    if saved_by_mflux(place):
        network = new_network(config)
        tensors = quantization.widened(network, to_mlx(_tensors(place, STEM), keys.MFLUX_VAE), str(place))
        load_strict(network, tensors, where=str(place), dtype=compute_dtype(dtype))
        return VAE(network=network.eval())
    alone = place / f"{STEM}.{variant}.safetensors"
    if (file := alone if alone.is_file() else single_file(folder, "vae")) is not None:
        return VAE(network=open_network(file, dtype, config=config))
    return VAE(network=open_network(place, dtype))


def told_by_weights(place: Path) -> FluxTransformerConfig:
    """What follows from a transformer's keys: schnell or dev, and how many blocks.

    Args:
        place: a pipeline's folder, or a file.

    Raises:
        WeightsError: there is no transformer.
    """
    _, tensors = _transformer_tensors(place)
    found = [(match[1], int(match[2])) for match in map(_BLOCK.fullmatch, tensors) if match]
    doubles, singles = (
        1 + max((index for kind, index in found if kind == name), default=-1)
        for name in ("transformer_blocks", "single_transformer_blocks")
    )
    return FluxTransformerConfig(
        guidance_embeds=any("guidance_embedder" in key for key in tensors),
        num_layers=doubles,
        num_single_layers=singles,
    )


def single_file(folder: Path, part: str) -> Path | None:
    """Black Forest Labs' file of a part that has no folder of its own: of the transformer or the autoencoder."""
    if any(any((folder / part).glob(f"*{suffix}")) for suffix in (".safetensors", ".bin")):
        return None
    found = [file for pattern in _SINGLE_FILES.get(part, ()) for file in sorted(folder.glob(pattern))]
    return found[0] if found else None


def saved_by_mflux(place: Path) -> bool:
    """Whether the folder of a part was written by mflux."""
    index = place / f"{TEXT_STEM}.safetensors.index.json"
    if index.is_file():
        metadata = read_json(index).get("metadata")
        return isinstance(metadata, dict) and "mflux_version" in metadata
    shard = place / "0.safetensors"
    return shard.is_file() and "mflux_version" in header(shard)[1]


def is_transformer(file: Path) -> bool:
    """Whether a file holds a FLUX.1 transformer, as far as its keys say."""
    try:
        names = open_weights(file)[0]
    except WeightsError:
        return False
    return keys.is_bfl(names) or any(_BLOCK.fullmatch(name) for name in names)


def _transformer_tensors(where: Path, variant: str | None = None) -> tuple[Path, dict[str, mx.array]]:
    """Where the transformer is, and its tensors under our names."""
    file = where if where.is_file() else single_file(where, "transformer")
    place = file or where / "transformer"
    tensors = _of_file(place) if file else _tensors(place, STEM, variant)
    named = keys.from_bfl(tensors) if keys.is_bfl(tensors) else to_mlx(tensors, keys.MFLUX_TRANSFORMER)
    return place, named


def _tensors(place: Path, stem: str, variant: str | None = None) -> dict[str, mx.array]:
    """Of the folder of a part, under the names that are in its files."""
    if not saved_by_mflux(place):
        return read_folder(place, stem, variant)
    if (place / f"{TEXT_STEM}.safetensors.index.json").is_file():
        return read_folder(place, TEXT_STEM)
    tensors: dict[str, mx.array] = {}
    for shard in sorted(place.glob("[0-9]*.safetensors")):  # of releases that wrote no index
        tensors |= _of_file(shard)
    return tensors


def _of_file(file: Path) -> dict[str, mx.array]:
    return {name: stored.load() for name, stored in open_weights(file)[0].items()}


def _filled(network: N, tensors: Tensors, source: Path, dtype: mx.Dtype | None) -> N:
    ready = quantization.prepared(network, tensors, str(source))
    load_strict(network, ready, where=str(source), dtype=compute_dtype(dtype))
    return network
