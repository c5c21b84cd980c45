"""mflux's `ZImage` as a pipeline: Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mflux_vae_train.pipelines.mflux.families import qwen3_config, shared_autoencoder, shared_parts
from mflux_vae_train.pipelines.mflux.host import Hosted, check_precision
from mflux_vae_train.pipelines.z_image.configs import BASE, PUBLISHED, TURBO
from mflux_vae_train.pipelines.z_image.family import FAMILY
from mflux_vae_train.pipelines.z_image.pipeline import ZImagePipeline


class HostedZImage(Hosted, ZImagePipeline):
    """`ZImagePipeline` over a `ZImage` of mflux."""


def wrap(model: Any) -> HostedZImage:
    """A pipeline that shares the arrays of a `ZImage`; errors as in `mflux.as_pipeline`."""
    check_precision(model)
    about, transformer = model.model_config, model.transformer
    known = PUBLISHED.get(about.model_name) or PUBLISHED[BASE if about.supports_guidance else TURBO]
    vae, vae_config = shared_autoencoder(FAMILY, model.vae, known.vae)
    configs = replace(
        known,
        transformer=replace(
            known.transformer,
            dim=transformer.dim,
            n_layers=len(transformer.layers),
            n_refiner_layers=len(transformer.noise_refiner),
            n_heads=transformer.n_heads,
            n_kv_heads=transformer.n_heads,
            cap_feat_dim=len(transformer.cap_embedder[0].weight),
            axes_dims=tuple(transformer.rope_embedder.axes_dims),
        ),
        text_encoder=qwen3_config(known.text_encoder, model.text_encoder),
        vae=vae_config,
    )
    modules = {"transformer": transformer, "text_encoder": model.text_encoder}
    parts = shared_parts(FAMILY, configs, modules, vae, {"tokenizer": model.tokenizers["z_image"]})
    return HostedZImage(parts, configs, name=about.aliases[0], base_model=about.model_name).host_in(model)
