"""mflux's `Flux1` as a pipeline: FLUX.1 schnell, dev and Krea dev."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mflux_vae_train.pipelines.flux1.configs import PUBLISHED, published
from mflux_vae_train.pipelines.flux1.family import FAMILY
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.mflux.families import shared_autoencoder, shared_parts
from mflux_vae_train.pipelines.mflux.host import Hosted


class HostedFlux1(Hosted, FluxPipeline):
    """`FluxPipeline` over a `Flux1` of mflux."""


def wrap(model: Any) -> HostedFlux1:
    """A pipeline that shares the arrays of a `Flux1`; errors as in `mflux.as_pipeline`."""
    about, transformer = model.model_config, model.transformer
    t5, clip = model.t5_text_encoder, model.clip_text_encoder
    known = PUBLISHED.get(about.model_name) or published(bool(about.supports_guidance))
    vae, vae_config = shared_autoencoder(FAMILY, model.vae, known.vae)
    # mflux fixes all other numbers
    configs = replace(
        known,
        transformer=replace(
            known.transformer,
            num_layers=len(transformer.transformer_blocks),
            num_single_layers=len(transformer.single_transformer_blocks),
        ),
        text_encoder=replace(
            known.text_encoder,
            vocab_size=len(clip.text_model.embeddings.token_embedding.weight),
            num_hidden_layers=len(clip.text_model.encoder.layers),
        ),
        text_encoder_2=replace(
            known.text_encoder_2,
            vocab_size=len(t5.shared.weight),
            d_ff=len(t5.t5_blocks[0].ff.DenseReluDense.wi_0.weight),
            num_layers=len(t5.t5_blocks),
        ),
        vae=vae_config,
    )
    modules = {"transformer": transformer, "text_encoder": clip, "text_encoder_2": t5}
    tokenizers = {"tokenizer": model.tokenizers["clip"], "tokenizer_2": model.tokenizers["t5"]}
    parts = shared_parts(FAMILY, configs, modules, vae, tokenizers)
    return HostedFlux1(parts, configs, name=about.aliases[0], base_model=about.model_name).host_in(model)
