"""The published FLUX.1 models: repositories, configurations and recommended settings, known without a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mflux_vae.pretrained.presets import PRESETS
from mflux_vae.weights.keymaps.rules import Tensors
from mflux_vae_train.pipelines.flow.family import block_counts
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.flux1.packing import PATCH, VAE_FACTOR
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformerConfig
from mflux_vae_train.pipelines.noise import SCHNELL_STEPS
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.text.clip import CLIP_L, CLIPTextConfig
from mflux_vae_train.pipelines.text.t5 import T5Config

REPOSITORIES = {"schnell": "black-forest-labs/FLUX.1-schnell", "dev": "black-forest-labs/FLUX.1-dev"}
"""Names that `--model` accepts, and their repositories."""

KREA = "black-forest-labs/FLUX.1-Krea-dev"

SIZE_MULTIPLE = VAE_FACTOR * PATCH


@dataclass(frozen=True, kw_only=True)
class Configs:
    """Configurations of a FLUX.1 pipeline.

    Attributes:
        vae: accepted by `mflux_vae.pretrained.loading.new_network`.
    """

    transformer: FluxTransformerConfig
    text_encoder: CLIPTextConfig
    text_encoder_2: T5Config
    vae: Mapping[str, Any]
    schedule: FlowMatchSchedule
    recommended: Recommended


T5_XXL = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")

DEV = Recommended(
    resolution=512,
    size_multiple=SIZE_MULTIPLE,
    learning_rate=1e-4,
    learning_rate_full=5e-6,
    guidance=3.5,
    steps=28,
    rank=16,
    caption_dropout=0.0,
    weighting_scheme="flux_shift",
    usual_guidance=(1.5, 5.0),
)
SCHNELL = replace(
    DEV,
    guidance=1.0,
    steps=SCHNELL_STEPS,
    weighting_scheme="schnell",
    most_guidance=1.0,
    usual_guidance=(0.0, 1.0),
)


def published(guidance_embeds: bool) -> Configs:
    """Configurations of dev, which embeds its guidance, or of schnell."""
    schedule = FlowMatchSchedule(shift=3.0, use_dynamic_shifting=True) if guidance_embeds else FlowMatchSchedule()
    return Configs(
        transformer=FluxTransformerConfig(guidance_embeds=guidance_embeds),
        text_encoder=CLIP_L,
        text_encoder_2=T5_XXL,
        vae=PRESETS["flux1"].config.to_dict(),
        schedule=schedule,
        recommended=DEV if guidance_embeds else SCHNELL,
    )


PUBLISHED = {
    REPOSITORIES["schnell"]: published(False),
    REPOSITORIES["dev"]: published(True),
    KREA: replace(published(True), recommended=replace(DEV, guidance=4.5)),
}
"""By repository. A further model of this architecture is one row here, and in `GATED` if it is."""

GATED = frozenset({REPOSITORIES["dev"], KREA})
"""Repositories under a non-commercial licence that has to be accepted before a download."""


def config_from_tensors(tensors: Tensors) -> FluxTransformerConfig:
    """Configuration of a transformer as its tensors' names show it: schnell or dev, and the number of blocks."""
    doubles, singles = block_counts(tensors, "transformer_blocks", "single_transformer_blocks")
    return FluxTransformerConfig(
        guidance_embeds=any("guidance_embedder" in key for key in tensors),
        num_layers=doubles,
        num_single_layers=singles,
    )
