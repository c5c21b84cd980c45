"""A FLUX.1 pipeline's folder in diffusers' layout: read into parts, written from them.

    model_index.json  recommended.json (ours, optional)  scheduler/scheduler_config.json
    transformer/  vae/  text_encoder/  text_encoder_2/     config.json and safetensors, one file or shards
    tokenizer/  tokenizer_2/                               copied as they are

`recommended.json` holds the fields of `Recommended`, for models that are neither schnell nor dev. The transformer may
also be Black Forest Labs' single file beside these folders, and mflux's saves need no configuration (see `weights`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.pretrained.loading import new_network
from mflux_vae.vae import VAE
from mflux_vae.weights.formats.files import DTYPES, convert_safetensors, read_json, write_json
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae_train.pipelines.config_check import typed
from mflux_vae_train.pipelines.flux1 import weights
from mflux_vae_train.pipelines.flux1.configs import Configs, published
from mflux_vae_train.pipelines.flux1.packing import PATCH, VAE_FACTOR
from mflux_vae_train.pipelines.flux1.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformerConfig
from mflux_vae_train.pipelines.lazy import Lazy
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.text import clip, t5

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

T = TypeVar("T")

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


def read_configs(folder: Path) -> Configs:
    """What a folder says of its parts; nothing large is read.

    Raises:
        WeightsError: it holds another pipeline, or a configuration is missing or broken.
        SettingsError: a configuration asks for what is not supported.
    """
    foreign = opens(folder)
    if not foreign and (kind := read_json(folder / "model_index.json").get("_class_name")) != "FluxPipeline":
        raise WeightsError(f"{folder}: holds a {kind}; FluxPipeline opens folders of FluxPipeline")
    told = {part: _config(folder, part) for part in ("transformer", "text_encoder", "text_encoder_2", "vae")}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    transformer = _made(
        FluxTransformerConfig.from_dict, told["transformer"], folder / "transformer"
    ) or weights.told_by_weights(folder)
    known = published(transformer.guidance_embeds)
    configs = Configs(
        transformer=transformer,
        text_encoder=_made(clip.CLIPTextConfig.from_dict, told["text_encoder"], folder / "text_encoder")
        or known.text_encoder,
        text_encoder_2=_made(t5.T5Config.from_dict, told["text_encoder_2"], folder / "text_encoder_2")
        or known.text_encoder_2,
        vae=told["vae"] or known.vae,
        schedule=known.schedule
        if foreign and not scheduler.is_file()
        else typed(lambda: FlowMatchSchedule.from_dict(read_json(scheduler)), scheduler),
        recommended=_read_recommended(folder / "recommended.json"),
    )
    _check_that_they_fit(configs, folder)
    return configs


def opens(folder: Path) -> bool:
    """Whether a folder without `model_index.json` is FLUX.1's all the same: mflux's saves have none."""
    whole = (folder / "model_index.json").is_file()
    return not whole and weights.saved_by_mflux(folder / "transformer") and (folder / "text_encoder_2").is_dir()


def parts(
    configs: Configs, folder: Callable[[], Path], *, dtype: mx.Dtype | None, variant: str | None
) -> dict[str, Any]:
    """What FluxPipeline is made of, by the names of its arguments; each part is loaded when it is first used.

    Args:
        folder: gives the folder, which may take a download.
        dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
        variant: of the weights files, such as "fp16".
    """
    loaders: dict[str, Callable[..., Any]] = {
        "transformer": weights.transformer,
        "text_encoder": weights.text_encoder,
        "text_encoder_2": weights.text_encoder_2,
        "vae": weights.autoencoder,
    }

    def part(name: str, load: Callable[..., Any]) -> Lazy[Any]:
        config = getattr(configs, name)
        return Lazy(lambda: load(folder(), config, dtype, variant), config=config)

    return {
        **{name: part(name, load) for name, load in loaders.items()},
        "tokenizer_folder": lambda: folder() / "tokenizer",
        "tokenizer_2_folder": lambda: folder() / "tokenizer_2",
        "schedule": configs.schedule,
        "recommended": configs.recommended,
    }


def _config(folder: Path, part: str) -> dict[str, Any] | None:
    """A part's configuration; None where there is none and none is needed, as its weights can only be FLUX.1's."""
    file = folder / part / "config.json"
    alone = weights.saved_by_mflux(folder / part) or weights.single_file(folder, part) is not None
    return None if alone and not file.is_file() else read_json(file)


def _made(kind: Callable[[Any], T], told: Mapping[str, Any] | None, where: Path) -> T | None:
    return None if told is None else typed(lambda: kind(told), where / "config.json")


def _check_that_they_fit(configs: Configs, where: Path) -> None:
    vae = VAE(network=new_network(configs.vae))  # its weights are drawn when they are used, and they are not
    packed, inputs = PATCH**2 * vae.latent_channels, configs.transformer.in_channels
    if (vae.spatial_scale, inputs) != (VAE_FACTOR, packed):
        raise WeightsError(
            f"{where}: autoencoder and transformer do not belong together: latents of {vae.latent_channels} channels "
            f"at 1/{vae.spatial_scale} of the size, and {inputs} inputs; {packed} inputs and 1/{VAE_FACTOR} are needed"
        )


def write(pipeline: FluxPipeline, folder: Path, dtype: str) -> None:
    """Write every part, each file whole or not at all; `model_index.json`, which makes it a pipeline, last.

    Raises:
        SettingsError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"weights are stored as {', '.join(DTYPES)}, not {dtype!r}")
    for name, part in pipeline.networks.items():
        _save(part, folder / name, STEM if name == "transformer" else weights.TEXT_STEM, DTYPES[dtype])
    pipeline.vae.save_pretrained(folder / "vae", dtype)
    _copy(pipeline.tokenizer_folder, folder / "tokenizer")
    _copy(pipeline.tokenizer_2_folder, folder / "tokenizer_2")
    write_json(folder / "scheduler" / "scheduler_config.json", pipeline.schedule.to_dict())
    write_json(folder / "recommended.json", asdict(pipeline.recommended))
    write_json(folder / "model_index.json", _INDEX)


def _save(part: Lazy[Any], folder: Path, stem: str, dtype: mx.Dtype) -> None:
    module = part.borrow()
    config, tensors = module.config.to_dict(), dict(tree_flatten(module.parameters()))
    del module  # what was loaded for this alone is freed tensor by tensor
    convert_safetensors(folder / f"{stem}.safetensors", tensors, dtype)
    write_json(folder / "config.json", config)


def _read_recommended(path: Path) -> Recommended | None:
    if not path.is_file():
        return None
    try:
        told: Any = {
            name: tuple(value) if isinstance(value, list) else value for name, value in read_json(path).items()
        }
        recommended = typed(lambda: Recommended(**told), path)
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
