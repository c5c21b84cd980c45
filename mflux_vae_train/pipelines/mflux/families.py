"""Parts of pipelines of a `Family` from the modules of a model object, and the configuration of its Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.nn as nn

from mflux_vae.vae import VAE
from mflux_vae_train.pipelines.flow import files
from mflux_vae_train.pipelines.flow.family import Family
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.mflux.sharing import Shared, tokenizer
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.text.qwen3 import Qwen3Config

_EMBEDDINGS = ("model.embed_tokens",)


def shared_parts(family: Family, configs: Any, model: Any, vae: Lazy[VAE], tokenizers: Mapping[str, Any]) -> Parts:
    """Parts of a family, whose networks the model object has as attributes of the same names.

    Args:
        tokenizers: mflux's, by the family's name.
    """
    networks = {
        part: Shared(partial(stored.build, getattr(configs, part)), getattr(model, part), stored.named, _EMBEDDINGS)
        for part, stored in family.networks.items()
    }
    return files.parts_of(family, networks, vae, {name: tokenizer(theirs) for name, theirs in tokenizers.items()})


def qwen3_config(published: Qwen3Config, encoder: Any) -> Qwen3Config:
    """Configuration of mflux's Qwen3, whose sizes may differ from a published one."""
    layer = encoder.layers[0]
    head = len(layer.self_attn.q_norm.weight)
    return replace(
        published,
        vocab_size=len(encoder.embed_tokens.weight),
        hidden_size=len(encoder.norm.weight),
        intermediate_size=len(layer.mlp.gate_proj.weight),
        num_hidden_layers=len(encoder.layers),
        num_attention_heads=len(layer.self_attn.q_proj.weight) // head,
        num_key_value_heads=len(layer.self_attn.k_proj.weight) // head,
        head_dim=head,
    )


def inputs_of(layer: Any) -> int:
    """Number of inputs of a linear layer, quantized or not."""
    columns: int = layer.weight.shape[-1]
    return columns * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else columns
