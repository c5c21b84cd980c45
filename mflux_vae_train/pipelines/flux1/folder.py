"""A FLUX.1 pipeline's folder: read into configurations and parts, and written.

See `pipelines.loading.folder` for the layout. The transformer may also be Black Forest Labs' single file beside the
folders of the other parts. Folders saved by mflux need no configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from mflux_vae.errors import WeightsError
from mflux_vae.pretrained.loading import new_network
from mflux_vae.vae import VAE
from mflux_vae.weights.formats.files import read_json, write_json
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.flux1 import weights
from mflux_vae_train.pipelines.flux1.configs import Configs, published
from mflux_vae_train.pipelines.flux1.packing import PATCH, VAE_FACTOR
from mflux_vae_train.pipelines.flux1.parts import flux_parts
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformerConfig
from mflux_vae_train.pipelines.loading.config_check import check_config
from mflux_vae_train.pipelines.loading.folder import RECOMMENDED, read_recommended, saved_by_mflux
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.text import clip, t5
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer

C = TypeVar("C")

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
    """Read the configurations of a folder's parts; no weights are read.

    Raises:
        WeightsError: it holds another pipeline, or a configuration is missing or broken.
        SettingsError: a configuration needs an unsupported option.
    """
    of_mflux = opens(folder)
    if not of_mflux and (kind := read_json(folder / "model_index.json").get("_class_name")) != "FluxPipeline":
        raise WeightsError(f"{folder}: holds a {kind}; FluxPipeline opens folders of FluxPipeline")
    transformer = _read(folder, "transformer", FluxTransformerConfig.from_dict) or weights.config_from_weights(folder)
    known = published(transformer.guidance_embeds)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    schedule = known.schedule
    if scheduler.is_file() or not of_mflux:
        schedule = check_config(lambda: FlowMatchSchedule.from_dict(read_json(scheduler)), scheduler)
    configs = Configs(
        transformer=transformer,
        text_encoder=_read(folder, "text_encoder", clip.CLIPTextConfig.from_dict) or known.text_encoder,
        text_encoder_2=_read(folder, "text_encoder_2", t5.T5Config.from_dict) or known.text_encoder_2,
        vae=_config_json(folder, "vae") or known.vae,
        schedule=schedule,
        recommended=read_recommended(folder) or known.recommended,
    )
    _check_that_they_fit(configs, folder)
    return configs


def opens(folder: Path) -> bool:
    """Whether mflux saved a FLUX.1 pipeline there, without a `model_index.json`."""
    if (folder / "model_index.json").is_file():
        return False
    return saved_by_mflux(folder / "transformer") and (folder / "text_encoder_2").is_dir()


def open_parts(
    configs: Configs,
    folder: Callable[[], Path],
    *,
    dtype: mx.Dtype | None = None,
    variant: str | None = None,
    transformer_file: Path | None = None,
) -> Parts:
    """The parts of a folder, each loaded on first use.

    Args:
        folder: returns the folder, and may download it.
        dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
        variant: of the weights files, such as "fp16".
        transformer_file: file of the transformer, if it is not in the folder.
    """
    place = (lambda: transformer_file) if transformer_file else folder
    lazy: Any = partial(Lazy, prepare=folder)
    return flux_parts(
        transformer=Lazy(lambda: weights.transformer(place(), configs.transformer, dtype, variant), prepare=place),
        vae=lazy(lambda: weights.autoencoder(folder(), configs.vae, dtype, variant)),
        text_encoder=lazy(lambda: weights.text_encoder(folder(), configs.text_encoder, dtype, variant)),
        text_encoder_2=lazy(lambda: weights.text_encoder_2(folder(), configs.text_encoder_2, dtype, variant)),
        tokenizer=LazyTokenizer(lambda: folder() / "tokenizer"),
        tokenizer_2=LazyTokenizer(lambda: folder() / "tokenizer_2"),
    )


def write(parts: Parts, configs: Configs, folder: Path, dtype: str) -> None:
    """Write every part, and last `model_index.json`, which makes the folder a pipeline.

    Raises:
        SettingsError: an unknown dtype.
    """
    parts.save(folder, dtype, weights.STEMS)
    write_json(folder / "scheduler" / "scheduler_config.json", configs.schedule.to_dict())
    write_json(folder / RECOMMENDED, asdict(configs.recommended))
    write_json(folder / "model_index.json", _INDEX)


def _config_json(folder: Path, part: str) -> dict[str, Any] | None:
    """A part's config.json; None if it is missing and the layout of the weights implies it."""
    file = folder / part / "config.json"
    implied = saved_by_mflux(folder / part) or weights.single_file(folder, part) is not None
    return None if implied and not file.is_file() else read_json(file)


def _read(folder: Path, part: str, from_dict: Callable[[Mapping[str, Any]], C]) -> C | None:
    config = _config_json(folder, part)
    return None if config is None else check_config(partial(from_dict, config), folder / part / "config.json")


def _check_that_they_fit(configs: Configs, folder: Path) -> None:
    vae = VAE(network=new_network(configs.vae))  # its random weights are lazy and never computed
    packed, inputs = PATCH**2 * vae.latent_channels, configs.transformer.in_channels
    if (vae.spatial_scale, inputs) != (VAE_FACTOR, packed):
        raise WeightsError(
            f"{folder}: autoencoder and transformer do not belong together: latents of {vae.latent_channels} channels "
            f"at 1/{vae.spatial_scale} of the size, and {inputs} inputs; {packed} inputs and 1/{VAE_FACTOR} are needed"
        )
