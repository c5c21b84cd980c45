"""Where Z-Image's networks are stored: see `flow.family`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux_vae.weights.formats.files import read_json
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import Tensors
from mflux_vae_train.pipelines.flow.family import Family, NetworkFiles, block_counts, taken_by_name
from mflux_vae_train.pipelines.text import qwen3, qwen3_memory
from mflux_vae_train.pipelines.z_image import keys
from mflux_vae_train.pipelines.z_image.configs import BASE, OF_TURBO, PUBLISHED, REPOSITORIES, TURBO
from mflux_vae_train.pipelines.z_image.packing import VAE_FACTOR
from mflux_vae_train.pipelines.z_image.transformer import ZImageTransformer, ZImageTransformerConfig


def is_quantized_layer(path: str) -> bool:
    """Layers of the blocks. The embedders are small, and sensitive to rounding."""
    return path.startswith(("layers.", "noise_refiner.", "context_refiner."))


def text_encoder(config: qwen3.Qwen3Config) -> qwen3.Qwen3Encoder:
    """Qwen3 without its last layer, whose output Z-Image does not read."""
    return qwen3.Qwen3Encoder(config, config.num_hidden_layers - 1)


def config_from_tensors(tensors: Tensors) -> ZImageTransformerConfig:
    """Configuration of a published transformer with as many blocks as the tensors have."""
    layers, refiners = block_counts(tensors, "layers", "noise_refiner")
    return ZImageTransformerConfig(n_layers=layers, n_refiner_layers=refiners)


def derives_from(_: ZImageTransformerConfig, index: Mapping[str, Any], place: Path) -> str:
    """Base model or Turbo, which differ in their schedules; the name tells them apart where there is no schedule."""
    scheduler = place / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        return TURBO if read_json(scheduler).get("shift") == OF_TURBO.schedule.shift else BASE
    return taken_by_name(place, TURBO if "turbo" in place.name.lower() else BASE)


FAMILY = Family(
    class_name="ZImagePipeline",
    version="0.36.0",  # the first with Z-Image
    networks={
        "transformer": NetworkFiles(
            build=ZImageTransformer,
            read_config=ZImageTransformerConfig.from_dict,
            entry=("diffusers", "ZImageTransformer2DModel"),
            stem=STEM,
            named=keys.our_names,
            quantized=is_quantized_layer,
        ),
        "text_encoder": NetworkFiles(
            build=text_encoder,
            read_config=qwen3.Qwen3Config.from_dict,
            entry=("transformers", "Qwen3ForCausalLM"),
            named=qwen3.published_names,
            quantized=qwen3.is_quantized_text_layer,
            stored_bytes=qwen3_memory.stored_bytes,
        ),
    },
    tokenizers={"tokenizer": "Qwen2Tokenizer"},
    vae_class="AutoencoderKL",
    latent_scale=VAE_FACTOR,
    text_widths=lambda configs: (configs.transformer.cap_feat_dim, configs.text_encoder.hidden_size),
    recognizes=keys.is_z_image,
    config_from_tensors=config_from_tensors,
    published=PUBLISHED,
    derives_from=derives_from,
    names=REPOSITORIES,
    mflux_vae=keys.MFLUX_VAE,
)
