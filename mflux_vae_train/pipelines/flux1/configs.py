"""The published FLUX.1 models: where they are, and their configurations, which need no download to be known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mflux_vae.pretrained.presets import PRESETS
from mflux_vae_train.pipelines.flux1.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformerConfig
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.text.clip import CLIPTextConfig
from mflux_vae_train.pipelines.text.t5 import T5Config

REPOSITORIES = {"schnell": "black-forest-labs/FLUX.1-schnell", "dev": "black-forest-labs/FLUX.1-dev"}
"""Names that `--model` takes, and the repositories they stand for."""


@dataclass(frozen=True, kw_only=True)
class Configs:
    """What is known of a FLUX.1 pipeline before its weights are there.

    Attributes:
        vae: what `mflux_vae.pretrained.loading.new_network` takes.
        recommended: None for what suits schnell or dev, whichever it resembles.
    """

    transformer: FluxTransformerConfig
    text_encoder: CLIPTextConfig
    text_encoder_2: T5Config
    vae: Mapping[str, Any]
    schedule: FlowMatchSchedule
    recommended: Recommended | None = None


CLIP_L = CLIPTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    projection_dim=768,
    num_attention_heads=12,
    bos_token_id=0,
    eos_token_id=2,
)
T5_XXL = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")


def published(guidance_embeds: bool) -> Configs:
    """Configurations of dev, which is told its guidance, or of schnell."""
    schedule = FlowMatchSchedule(shift=3.0, use_dynamic_shifting=True) if guidance_embeds else FlowMatchSchedule()
    return Configs(
        transformer=FluxTransformerConfig(guidance_embeds=guidance_embeds),
        text_encoder=CLIP_L,
        text_encoder_2=T5_XXL,
        vae=PRESETS["flux1"].config.to_dict(),
        schedule=schedule,
    )


PUBLISHED = {REPOSITORIES["schnell"]: published(False), REPOSITORIES["dev"]: published(True)}
"""By repository."""
