"""Small text encoders and tokenizers of Stable Diffusion 1, 2 and SDXL, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.stable_diffusion.prompts import SDPrompts
from mflux_vae_train.pipelines.text import clip
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer
from tests.mflux_vae_train.pipelines.text.clip_folders import write_clip_folder

WORDS = ["a", "an", "and", "blue", "circle", "dog", "of", "on", "photo", "red", "sks", "star"]
LENGTH = 16

LAYOUTS = {"sd1": ("sd1",), "sd2": ("sd2",), "sdxl": ("sdxl", "sdxl_2")}
"""Layouts of the tokenizers by model."""

_ACTIVATIONS = {"sd1": "quick_gelu", "sd2": "gelu", "sdxl": "quick_gelu", "sdxl_2": "gelu"}
_WIDTHS = {"sdxl_2": 24}


def small_prompts(folder: Path, model: str, *, zeros_for_empty: bool = True) -> SDPrompts:
    """Prompts of `small_parts`.

    Args:
        zeros_for_empty: used for SDXL alone.
    """
    parts = small_parts(folder, model)
    configs = {name: encoder.get().config for name, encoder in parts.networks.items()}
    return SDPrompts(parts, configs, zeros_for_empty=zeros_for_empty and model == "sdxl")


def small_parts(folder: Path, model: str) -> Parts:
    """Random text encoders; the tokenizers' files go into `folder`."""
    encoders: dict[str, clip.CLIPTextModel] = {}
    tokenizers = {}
    for name, layout in zip(("", "_2"), LAYOUTS[model], strict=False):
        place = folder / f"tokenizer{name}"
        size = write_clip_folder(WORDS, place, layout, LENGTH)
        settings: dict[str, Any] = dict(
            vocab_size=size,
            hidden_size=_WIDTHS.get(layout, 20),
            intermediate_size=32,
            num_hidden_layers=5,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            hidden_act=_ACTIVATIONS[layout],
            eos_token_id=2,
            projection_dim=14,
        )
        if name:
            encoder = clip.CLIPTextModelWithProjection(clip.CLIPTextConfigWithProjection(**settings))
        else:
            encoder = clip.CLIPTextModel(clip.CLIPTextConfig(**settings))
        clip.init_weights(encoder, mx.random.key(len(name)), embedding_std=0.5)
        encoders[f"text_encoder{name}"], tokenizers[f"tokenizer{name}"] = encoder, LazyTokenizer(place)
    return Parts(
        networks={name: Lazy.of(encoder) for name, encoder in encoders.items()},
        vae=Lazy(lambda: None),
        tokenizers=tokenizers,
        quantized={},
    )
