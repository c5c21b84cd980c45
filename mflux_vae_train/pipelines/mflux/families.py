"""Parts of pipelines of a `Family` from the modules of a model object, and their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.integrations.mflux import MfluxVAE
from mflux_vae.vae import VAE
from mflux_vae_train.pipelines.flow import files
from mflux_vae_train.pipelines.flow.family import Family
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.mflux.sharing import Shared, tokenizer
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.text.qwen3 import Qwen3Config

_EMBEDDINGS = ("shared", "text_model.embeddings.token_embedding", "model.embed_tokens")
"""Embeddings of vocabularies in T5, CLIP and Qwen3, which are large."""


def shared_parts(
    family: Family, configs: Any, modules: Mapping[str, nn.Module], vae: Lazy[VAE], tokenizers: Mapping[str, Any]
) -> Parts:
    """Parts of a family.

    Args:
        modules: of the model object, by the family's names.
        tokenizers: mflux's, by the family's names.
    """
    networks = {
        part: Shared(partial(stored.build, getattr(configs, part)), modules[part], stored.named, _EMBEDDINGS)
        for part, stored in family.networks.items()
    }
    return files.parts_of(family, networks, vae, {name: tokenizer(theirs) for name, theirs in tokenizers.items()})


def shared_autoencoder(
    family: Family, module: Any, published: Mapping[str, Any]
) -> tuple[Lazy[VAE], Mapping[str, Any]]:
    """The autoencoder of a model object, and its configuration.

    It is ours if it replaced mflux's, else one with mflux's weights, which are float32 while it is loaded.
    """
    if isinstance(module, MfluxVAE):
        vae = cast(VAE, module.vae)
        return Lazy(loaded=vae), vae.config.to_dict()
    blocks = module.encoder.down_blocks
    config = {
        **published,
        "block_out_channels": [len(block.resnets[-1].conv1.weight) for block in blocks],
        "layers_per_block": len(blocks[0].resnets),
    }

    def share() -> VAE:
        tensors: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
        return files.autoencoder_of_mflux(family, config, tensors, f"mflux's {type(module).__name__}")

    return Lazy(share), config


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
