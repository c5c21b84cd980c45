"""The networks of FLUX.1 with their weights, from every layout they are published in.

diffusers' folders, sharded or not; Black Forest Labs' single file where there is no `transformer/`; folders saved by
mflux; and any of them with layers that MLX quantized. Tensors are read when they are first used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mflux_vae.errors import WeightsError
from mflux_vae.pretrained.loading import new_network, open_network
from mflux_vae.runtime.device import compute_dtype
from mflux_vae.vae import VAE
from mflux_vae.weights.formats.files import open_folder, open_weights
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import load_strict, to_mlx
from mflux_vae_train.pipelines.flux1 import keys
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig
from mflux_vae_train.pipelines.loading.folder import TEXT_STEM, fill, read_file, read_tensors, saved_by_mflux
from mflux_vae_train.pipelines.quantization import adopt_quantization
from mflux_vae_train.pipelines.text import clip, t5

STEMS = {"transformer": STEM, "text_encoder": TEXT_STEM, "text_encoder_2": TEXT_STEM, "vae": STEM}
"""Names of weights files by part."""

SINGLE_FILES = {"transformer": "flux1-*.safetensors", "vae": "ae.safetensors"}
"""Names of Black Forest Labs' files: `flux1-schnell.safetensors`, `flux1-dev.safetensors` and others."""

_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\..*")


def transformer(
    place: Path, config: FluxTransformerConfig, dtype: mx.Dtype | None = None, variant: str | None = None
) -> FluxTransformer:
    """Open the transformer in a pipeline's folder, or in a file.

    Args:
        place: the folder or the file.
        dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
        variant: of the weights files, such as "fp16".

    Raises:
        WeightsError: there are no weights, or their names or shapes differ; all differences are listed.
    """
    source, tensors = _transformer_tensors(place, variant)
    return fill(FluxTransformer(config), tensors, source, dtype)


def text_encoder(
    folder: Path, config: clip.CLIPTextConfig, dtype: mx.Dtype | None = None, variant: str | None = None
) -> clip.CLIPTextModel:
    """Open CLIP; arguments and errors as in `transformer`."""
    place = folder / "text_encoder"
    tensors = clip.published_names(read_tensors(place, TEXT_STEM, variant))
    return fill(clip.CLIPTextModel(config), tensors, place, dtype)


def text_encoder_2(
    folder: Path, config: t5.T5Config, dtype: mx.Dtype | None = None, variant: str | None = None
) -> t5.T5Encoder:
    """Open T5; arguments and errors as in `transformer`."""
    place = folder / "text_encoder_2"
    tensors = t5.published_names(to_mlx(read_tensors(place, TEXT_STEM, variant), keys.MFLUX_T5))
    return fill(t5.T5Encoder(config), tensors, place, dtype)


def autoencoder(
    folder: Path, config: Mapping[str, Any], dtype: mx.Dtype | None = None, variant: str | None = None
) -> VAE:
    """Open the autoencoder; arguments and errors as in `transformer`."""
    place = folder / "vae"
    if saved_by_mflux(place):
        network = new_network(config)
        tensors = adopt_quantization(network, to_mlx(read_tensors(place, STEM), keys.MFLUX_VAE), str(place), keep=False)
        load_strict(network, tensors, where=str(place), dtype=compute_dtype(dtype or mx.float32))
        return VAE(network=network.eval())
    of_variant = place / f"{STEM}.{variant}.safetensors"
    if (file := of_variant if of_variant.is_file() else single_file(folder, "vae")) is not None:
        return VAE(network=open_network(file, dtype, config=config))
    return VAE(network=open_network(place, dtype))


def config_from_weights(place: Path) -> FluxTransformerConfig:
    """Configuration of a transformer as its tensors' names show it: schnell or dev, and the number of blocks.

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
    """Black Forest Labs' file of a part whose folder has no weights."""
    if part not in SINGLE_FILES or any(any((folder / part).glob(f"*{kind}")) for kind in (".safetensors", ".bin")):
        return None
    return min(folder.glob(SINGLE_FILES[part]), default=None)


def is_stored(folder: Path, part: str, variant: str | None = None) -> bool:
    """Whether a pipeline's folder holds all weights of a part."""
    if saved_by_mflux(folder / part) or single_file(folder, part) is not None:
        return True
    try:
        open_folder(folder / part, STEMS[part], variant)
    except WeightsError:  # none, or only some shards
        return False
    return True


def is_transformer(file: Path) -> bool:
    """Whether the tensors of a file have the names of a FLUX.1 transformer's."""
    try:
        names = open_weights(file)[0]
    except WeightsError:
        return False
    return keys.is_flux1(names)


def _transformer_tensors(where: Path, variant: str | None = None) -> tuple[Path, dict[str, mx.array]]:
    """File or folder of the transformer, and its tensors under our names."""
    file = where if where.is_file() else single_file(where, "transformer")
    place = file or where / "transformer"
    tensors = read_file(place) if file else read_tensors(place, STEM, variant)
    return place, keys.from_bfl(tensors) if keys.is_bfl(tensors) else to_mlx(tensors, keys.MFLUX_TRANSFORMER)
