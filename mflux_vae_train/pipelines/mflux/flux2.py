"""mflux's `Flux2Klein` as a pipeline: FLUX.2 klein, base and distilled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.flux2.configs import PUBLISHED, published_repository
from mflux_vae_train.pipelines.flux2.family import FAMILY
from mflux_vae_train.pipelines.flux2.pipeline import Flux2KleinPipeline
from mflux_vae_train.pipelines.flux2.transformer import Flux2TransformerConfig
from mflux_vae_train.pipelines.mflux.families import inputs_of, qwen3_config, shared_autoencoder, shared_parts
from mflux_vae_train.pipelines.mflux.host import Hosted, check_precision


class HostedFlux2Klein(Hosted, Flux2KleinPipeline):
    """`Flux2KleinPipeline` over a `Flux2Klein` of mflux."""


def wrap(model: Any) -> HostedFlux2Klein:
    """A pipeline that shares the arrays of a `Flux2Klein`; errors as in `mflux.as_pipeline`."""
    check_precision(model)
    for option in ("small_text_encoder", "small_decoder"):
        if getattr(model, option, False):
            raise SettingsError(f"mflux's Flux2Klein was built with {option}: build it without to train")
    about, transformer = model.model_config, model.transformer
    attention, rope = transformer.single_transformer_blocks[0].attn, transformer.pos_embed
    config = Flux2TransformerConfig(
        in_channels=inputs_of(transformer.x_embedder),
        num_layers=len(transformer.transformer_blocks),
        num_single_layers=len(transformer.single_transformer_blocks),
        attention_head_dim=attention.dim_head,
        num_attention_heads=attention.heads,
        joint_attention_dim=inputs_of(transformer.context_embedder),
        mlp_ratio=attention.mlp_hidden_dim / attention.inner_dim,
        axes_dims_rope=tuple(rope.axes_dim),
        rope_theta=rope.theta,
    )
    distilled = "base" not in about.model_name.lower()
    known = PUBLISHED.get(about.model_name) or PUBLISHED[published_repository(config, distilled)]
    vae, vae_config = shared_autoencoder(FAMILY, model.vae, known.vae)
    text_encoder = qwen3_config(known.text_encoder, model.text_encoder)
    configs = replace(known, transformer=config, text_encoder=text_encoder, vae=vae_config)
    modules = {"transformer": transformer, "text_encoder": model.text_encoder}
    parts = shared_parts(FAMILY, configs, modules, vae, {"tokenizer": model.tokenizers["qwen3"]})
    return HostedFlux2Klein(parts, configs, name=about.aliases[0], base_model=about.model_name).host_in(model)
