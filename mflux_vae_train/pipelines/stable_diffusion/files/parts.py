"""The parts of a Stable Diffusion pipeline, each loaded on first use from a folder in diffusers' layout or a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mflux_vae.errors import WeightsError
from mflux_vae.pretrained.loading import open_network
from mflux_vae.vae import VAE
from mflux_vae.weights.formats.files import open_folder
from mflux_vae.weights.keymaps.diffusers import SAME_NAMES, STEM
from mflux_vae.weights.keymaps.rules import to_mlx
from mflux_vae_train.pipelines.loading.folder import TEXT_STEM, fill, read_tensors
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.stable_diffusion.configs import Configs
from mflux_vae_train.pipelines.stable_diffusion.files.single_file import SingleFile
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from mflux_vae_train.pipelines.text import clip
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer

STEMS = {"unet": STEM, "text_encoder": TEXT_STEM, "text_encoder_2": TEXT_STEM, "vae": STEM}
"""Names of weights files by part."""


def stems(configs: Configs) -> dict[str, str]:
    """`STEMS` of the parts that a pipeline has, the denoiser first."""
    return {part: stem for part, stem in STEMS.items() if part != "text_encoder_2" or configs.generation == 3}


def open_parts(
    configs: Configs,
    folder: Callable[[], Path],
    *,
    dtype: mx.Dtype | None = None,
    variant: str | None = None,
    single_file: SingleFile | None = None,
) -> Parts:
    """The parts of a pipeline.

    Args:
        folder: returns the folder, and may download it.
        dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
        variant: of the weights files, such as "fp16".
        single_file: where the parts are that it does not miss; tokenizers are always in the folder.
    """

    def lazy(part: str, load: Callable[[SingleFile | None], Any]) -> Lazy[Any]:
        file = single_file if single_file is not None and part not in single_file.missing else None
        return Lazy(lambda: load(file), prepare=folder if file is None else lambda: None)

    def network(part: str, build: Callable[[], Any]) -> Lazy[Any]:
        def load(file: SingleFile | None) -> Any:
            if file is not None:
                return fill(build(), file.read(part), file.path, dtype)
            place = folder() / part
            tensors = to_mlx(read_tensors(place, STEMS[part], variant), SAME_NAMES)
            return fill(build(), tensors if part == "unet" else clip.published_names(tensors), place, dtype)

        return lazy(part, load)

    def autoencoder(file: SingleFile | None) -> VAE:
        place = file.path if file is not None else folder() / "vae"
        of_variant = place / f"{STEM}.{variant}.safetensors"
        if file is None and not of_variant.is_file():
            return VAE(network=open_network(place, dtype))
        return VAE(network=open_network(place if file is not None else of_variant, dtype, config=configs.vae))

    second = configs.text_encoder_2
    return stable_diffusion_parts(
        unet=network("unet", lambda: UNet(configs.unet)),
        vae=lazy("vae", autoencoder),
        text_encoder=network("text_encoder", lambda: new_text_encoder(configs.text_encoder)),
        tokenizer=LazyTokenizer(lambda: folder() / "tokenizer"),
        text_encoder_2=None if second is None else network("text_encoder_2", lambda: new_text_encoder(second)),
        tokenizer_2=None if second is None else LazyTokenizer(lambda: folder() / "tokenizer_2"),
    )


def stable_diffusion_parts(
    *,
    unet: UNet | Lazy[UNet],
    vae: VAE | Lazy[VAE],
    text_encoder: clip.CLIPTextModel | Lazy[clip.CLIPTextModel],
    tokenizer: LazyTokenizer,
    text_encoder_2: clip.CLIPTextModelWithProjection | Lazy[clip.CLIPTextModelWithProjection] | None = None,
    tokenizer_2: LazyTokenizer | None = None,
) -> Parts:
    """Parts by diffusers' names; SDXL has two text encoders."""
    networks: dict[str, Lazy[Any]] = {"unet": Lazy.of(unet), "text_encoder": Lazy.of(text_encoder)}
    tokenizers, quantized = {"tokenizer": tokenizer}, {"unet": is_quantized_layer}
    if text_encoder_2 is not None and tokenizer_2 is not None:
        networks["text_encoder_2"], tokenizers["tokenizer_2"] = Lazy.of(text_encoder_2), tokenizer_2
        quantized["text_encoder_2"] = is_quantized_text_layer
    return Parts(networks=networks, vae=Lazy.of(vae), tokenizers=tokenizers, quantized=quantized)


def new_text_encoder(config: clip.CLIPTextConfig) -> clip.CLIPTextModel:
    """A text encoder with random weights, which are lazy."""
    if isinstance(config, clip.CLIPTextConfigWithProjection):
        return clip.CLIPTextModelWithProjection(config)
    return clip.CLIPTextModel(config)


def is_quantized_layer(path: str) -> bool:
    """Linear layers of the UNet's transformers, which hold most of its weights."""
    return ".attentions." in path


def is_quantized_text_layer(path: str) -> bool:
    """Layers of SDXL's second text encoder. The first has only 0.1 billion parameters and is not quantized."""
    return path.startswith("text_model.encoder.layers.")


def is_stored(folder: Path, part: str, variant: str | None = None) -> bool:
    """Whether a pipeline's folder holds all weights of a part."""
    try:
        open_folder(folder / part, STEMS[part], variant)
    except WeightsError:  # none, or only some shards
        return False
    return True
