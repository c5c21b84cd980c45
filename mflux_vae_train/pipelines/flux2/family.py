"""Where FLUX.2 klein's networks are stored: see `flow.family`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import Tensors
from mflux_vae_train.pipelines.flow.family import Family, NetworkFiles, block_counts, taken_by_name
from mflux_vae_train.pipelines.flux2 import keys
from mflux_vae_train.pipelines.flux2.configs import GATED, PUBLISHED, REPOSITORIES, SIZE_MULTIPLE, published_repository
from mflux_vae_train.pipelines.flux2.transformer import Flux2Transformer, Flux2TransformerConfig
from mflux_vae_train.pipelines.text import qwen3, qwen3_memory
from mflux_vae_train.pipelines.text.qwen3_prompts import KLEIN_TAPS

_DISTILLED = re.compile(r"klein[-_ ]?\d+b", re.IGNORECASE)
"""Names of published files of distilled models, such as flux-2-klein-4b; those of base models contain "base"."""


def is_quantized_layer(path: str) -> bool:
    """Layers of the transformer's blocks. The embedders are small, and sensitive to rounding."""
    return path.startswith(("transformer_blocks.", "single_transformer_blocks."))


def text_encoder(config: qwen3.Qwen3Config) -> qwen3.Qwen3Encoder:
    """Qwen3 without the layers after the last state that klein reads."""
    return qwen3.Qwen3Encoder(config, max(KLEIN_TAPS))


def config_from_tensors(tensors: Tensors) -> Flux2TransformerConfig:
    """Configuration of a transformer, whose heads have 128 channels."""
    doubles, singles = block_counts(tensors, "transformer_blocks", "single_transformer_blocks")
    known = Flux2TransformerConfig()
    width, joint = known.width, known.joint_attention_dim
    if (embedder := tensors.get("context_embedder.weight")) is not None and embedder.ndim == 2:
        width, joint = embedder.shape
    return Flux2TransformerConfig(
        num_layers=doubles,
        num_single_layers=singles,
        num_attention_heads=max(1, width // known.attention_head_dim),  # loading refuses narrower ones
        joint_attention_dim=joint,
        guidance_embeds=any("guidance_" in name.removeprefix("time_guidance_embed.") for name in tensors),
    )


def derives_from(config: Flux2TransformerConfig, index: Mapping[str, Any], place: Path) -> str:
    """The model of this width, base or distilled as `model_index.json` states; the name tells it of a single file."""
    if index:
        return published_repository(config, bool(index.get("is_distilled")))
    return taken_by_name(place, published_repository(config, _DISTILLED.search(place.name) is not None))


FAMILY = Family(
    class_name="Flux2KleinPipeline",
    version="0.37.0",  # the first with FLUX.2 klein
    networks={
        "transformer": NetworkFiles(
            build=Flux2Transformer,
            read_config=Flux2TransformerConfig.from_dict,
            entry=("diffusers", "Flux2Transformer2DModel"),
            stem=STEM,
            named=keys.our_names,
            quantized=is_quantized_layer,
            single_file="flux-2-klein-*.safetensors",
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
    tokenizers={"tokenizer": "Qwen2TokenizerFast"},
    vae_class="AutoencoderKLFlux2",
    latent_scale=SIZE_MULTIPLE,
    text_widths=lambda configs: (
        configs.transformer.joint_attention_dim,
        len(KLEIN_TAPS) * configs.text_encoder.hidden_size,
    ),
    recognizes=keys.is_flux2,
    config_from_tensors=config_from_tensors,
    published=PUBLISHED,
    derives_from=derives_from,
    index=lambda configs: {"is_distilled": configs.is_distilled},
    names=REPOSITORIES,
    gated=GATED,
    mflux_vae=keys.MFLUX_VAE,
)
