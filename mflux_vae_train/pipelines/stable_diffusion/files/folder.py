"""A Stable Diffusion pipeline's folder, see `pipelines.loading.folder`: read into configurations, and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mflux_vae.errors import WeightsError
from mflux_vae.pretrained.loading import new_network
from mflux_vae.vae import VAE
from mflux_vae.weights.formats.files import read_json, write_json
from mflux_vae_train.pipelines.loading.config_check import check_config
from mflux_vae_train.pipelines.loading.folder import RECOMMENDED, read_recommended
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.stable_diffusion.configs import VAE_FACTOR, Configs, recommended
from mflux_vae_train.pipelines.stable_diffusion.files.parts import stems
from mflux_vae_train.pipelines.stable_diffusion.schedule import DiscreteSchedule
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig
from mflux_vae_train.pipelines.text.clip import CLIPTextConfig, CLIPTextConfigWithProjection

C = TypeVar("C")

CLASS_NAMES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def read_configs(folder: Path) -> Configs:
    """Read the configurations of a folder's parts; no weights are read.

    Raises:
        WeightsError: it holds another pipeline, or a configuration is missing or broken.
        SettingsError: a configuration needs an unsupported option.
    """
    index = read_json(folder / "model_index.json")
    if (kind := index.get("_class_name")) not in CLASS_NAMES:
        raise WeightsError(f"{folder}: holds a {kind}; known are {' and '.join(CLASS_NAMES)}")
    unet = _read(folder / "unet" / "config.json", UNetConfig.from_dict)
    schedule = _read(folder / "scheduler" / "scheduler_config.json", DiscreteSchedule.from_dict)
    second, xl = None, kind == CLASS_NAMES[1]
    if xl:
        second = _read(folder / "text_encoder_2" / "config.json", CLIPTextConfigWithProjection.from_dict)
    configs = Configs(
        unet=unet,
        text_encoder=_read(folder / "text_encoder" / "config.json", CLIPTextConfig.from_dict),
        text_encoder_2=second,
        vae=read_json(folder / "vae" / "config.json"),
        schedule=schedule,
        recommended=read_recommended(folder) or recommended(unet, schedule),
        zero_empty_prompt=xl and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    _check_that_they_fit(configs, folder)
    return configs


def write(parts: Parts, configs: Configs, folder: Path, dtype: str) -> None:
    """Write every part, and last `model_index.json`, which makes the folder a pipeline.

    Raises:
        SettingsError: an unknown dtype.
    """
    parts.save(folder, dtype, stems(configs))
    scheduler = configs.schedule.to_dict()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / RECOMMENDED, asdict(configs.recommended))
    write_json(folder / "model_index.json", _index(configs, scheduler["_class_name"]))


def _index(configs: Configs, scheduler: str) -> dict[str, Any]:
    """model_index.json, as diffusers writes it."""
    index: dict[str, Any] = {
        "_class_name": configs.class_name,
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", configs.vae.get("_class_name", "AutoencoderKL")],
    }
    if configs.text_encoder_2 is None:
        return index | {"requires_safety_checker": False, "safety_checker": [None, None]}
    return index | {
        "force_zeros_for_empty_prompt": configs.zero_empty_prompt,
        "image_encoder": [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }


def _read(file: Path, from_dict: Callable[[Mapping[str, Any]], C]) -> C:
    return check_config(partial(from_dict, read_json(file)), file)


def _check_that_they_fit(configs: Configs, folder: Path) -> None:
    vae = VAE(network=new_network(configs.vae))  # its random weights are lazy and never computed
    if (vae.spatial_scale, vae.latent_channels) != (VAE_FACTOR, configs.unet.in_channels):
        raise WeightsError(
            f"{folder}: autoencoder and UNet do not belong together: latents of {vae.latent_channels} channels at"
            f" 1/{vae.spatial_scale} of the size, and a UNet for {configs.unet.in_channels} at 1/{VAE_FACTOR}"
        )
    first, second = configs.text_encoder, configs.text_encoder_2
    width = first.hidden_size + (0 if second is None else second.hidden_size)
    pooled = None if second is None else second.projection_dim
    if (configs.unet.cross_attention_dim, configs.unet.pooled_width) != (width, pooled):
        raise WeightsError(
            f"{folder}: text encoders and UNet do not belong together: text of width {width}, pooled {pooled}, and a"
            f" UNet for {configs.unet.cross_attention_dim} and {configs.unet.pooled_width}"
        )
