"""A FLUX.1 pipeline's folder in diffusers' layout: read into parts, written from them.

    model_index.json  recommended.json (ours, optional)  scheduler/scheduler_config.json
    transformer/  vae/  text_encoder/  text_encoder_2/     config.json and safetensors, one file or shards
    tokenizer/  tokenizer_2/                               copied as they are

`recommended.json` holds the fields of `Recommended`, for models that are neither schnell nor dev.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.runtime import compute_dtype
from mflux_vae.vae import VAE
from mflux_vae.weights.diffusers import STEM
from mflux_vae.weights.files import DTYPES, read_folder, read_json, write_json, write_safetensors
from mflux_vae.weights.rules import load_strict
from mflux_vae_train.pipelines.flux1.packing import PATCH, VAE_FACTOR
from mflux_vae_train.pipelines.flux1.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig
from mflux_vae_train.pipelines.protocol import NoiseSampling, Recommended
from mflux_vae_train.pipelines.text import clip, t5

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

_TEXT_STEM = "model"
"""transformers' name of a weights file; diffusers' is `STEM`."""

_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",  # the first with FLUX
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def read(folder: Path, dtype: mx.Dtype | None) -> dict[str, Any]:
    """What FluxPipeline is made of, by the names of its arguments.

    Raises:
        WeightsError: the folder holds another pipeline, a file is missing or broken, tensors do not fit.
        SettingsError: a configuration asks for what is not supported.
    """
    index = read_json(folder / "model_index.json")
    if (kind := index.get("_class_name")) != "FluxPipeline":
        raise WeightsError(f"{folder}: holds a {kind}; FluxPipeline opens folders of FluxPipeline")
    transformer = FluxTransformer(FluxTransformerConfig.from_dict(_config(folder / "transformer")))
    text_encoder = clip.CLIPTextModel(clip.CLIPTextConfig.from_dict(_config(folder / "text_encoder")))
    text_encoder_2 = t5.T5Encoder(t5.T5Config.from_dict(_config(folder / "text_encoder_2")))
    _load(transformer, folder / "transformer", STEM, dtype)
    _load(text_encoder, folder / "text_encoder", _TEXT_STEM, dtype, clip.published_names)
    _load(text_encoder_2, folder / "text_encoder_2", _TEXT_STEM, dtype, t5.published_names)
    vae = VAE.from_pretrained(folder / "vae", dtype)
    packed = PATCH**2 * vae.latent_channels
    if (vae.spatial_scale, transformer.config.in_channels) != (VAE_FACTOR, packed):
        raise WeightsError(
            f"{folder}: autoencoder and transformer do not belong together: latents of {vae.latent_channels} channels "
            f"at 1/{vae.spatial_scale} of the size, and {transformer.config.in_channels} inputs; {packed} inputs and "
            f"1/{VAE_FACTOR} are needed"
        )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "tokenizer_folder": folder / "tokenizer",
        "tokenizer_2_folder": folder / "tokenizer_2",
        "schedule": FlowMatchSchedule.from_dict(read_json(folder / "scheduler" / "scheduler_config.json")),
        "recommended": _read_recommended(folder / "recommended.json"),
        "name": folder.resolve().name,
    }


def write(pipeline: FluxPipeline, folder: Path, dtype: str) -> None:
    """Write every part, each file whole or not at all; `model_index.json`, which makes it a pipeline, last.

    Raises:
        SettingsError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"weights are stored as {', '.join(DTYPES)}, not {dtype!r}")
    _save(pipeline.denoiser, folder / "transformer", STEM, DTYPES[dtype])
    _save(pipeline.text_encoder, folder / "text_encoder", _TEXT_STEM, DTYPES[dtype])
    _save(pipeline.text_encoder_2, folder / "text_encoder_2", _TEXT_STEM, DTYPES[dtype])
    pipeline.vae.save_pretrained(folder / "vae", dtype)
    _copy(pipeline.tokenizer_folder, folder / "tokenizer")
    _copy(pipeline.tokenizer_2_folder, folder / "tokenizer_2")
    write_json(folder / "scheduler" / "scheduler_config.json", pipeline.schedule.to_dict())
    write_json(folder / "recommended.json", asdict(pipeline.recommended))
    write_json(folder / "model_index.json", _INDEX)


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _load(
    module: nn.Module,
    folder: Path,
    stem: str,
    dtype: mx.Dtype | None,
    named: Callable[[Mapping[str, mx.array]], dict[str, mx.array]] = dict,
) -> None:
    load_strict(module, named(read_folder(folder, stem)), where=str(folder), dtype=compute_dtype(dtype))


def _save(module: Any, folder: Path, stem: str, dtype: mx.Dtype) -> None:
    parameters = dict(tree_flatten(module.parameters()))
    tensors = {name: value.astype(dtype) for name, value in parameters.items()}
    write_safetensors(folder / f"{stem}.safetensors", tensors)
    write_json(folder / "config.json", module.config.to_dict())


def _read_recommended(path: Path) -> Recommended | None:
    if not path.is_file():
        return None
    try:
        recommended = Recommended(**read_json(path))
        NoiseSampling(scheme=recommended.weighting_scheme or "uniform")
        return recommended
    except (TypeError, SettingsError) as error:
        raise SettingsError(f"{path}: not the fields of Recommended ({error})") from error


def _copy(source: Path, target: Path) -> None:
    """Copy a folder's files, each whole or not at all; a folder written over itself stays."""
    target.mkdir(parents=True, exist_ok=True)
    if target.samefile(source):
        return
    for file in sorted(source.iterdir()):
        if file.is_file():
            temporary = target / f".{file.name}.writing"
            shutil.copyfile(file, temporary)
            os.replace(temporary, target / file.name)
