"""The published Z-Image models: repositories, configurations and recommended settings, known without a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mflux_vae.pretrained.presets import PRESETS
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.text.qwen3 import QWEN3_4B, Qwen3Config
from mflux_vae_train.pipelines.z_image.packing import PATCH, VAE_FACTOR
from mflux_vae_train.pipelines.z_image.transformer import ZImageTransformerConfig

BASE, TURBO = "Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"
REPOSITORIES = {"z-image": BASE, "z-image-turbo": TURBO}
"""Names that `--model` accepts, and their repositories."""

SIZE_MULTIPLE = VAE_FACTOR * PATCH


@dataclass(frozen=True, kw_only=True)
class Configs:
    """Configurations of a Z-Image pipeline.

    Attributes:
        vae: accepted by `mflux_vae.pretrained.loading.new_network`.
    """

    transformer: ZImageTransformerConfig
    text_encoder: Qwen3Config
    vae: Mapping[str, Any]
    schedule: FlowMatchSchedule
    recommended: Recommended


OF_BASE = Configs(
    transformer=ZImageTransformerConfig(),
    text_encoder=QWEN3_4B,
    vae=PRESETS["z-image"].config.to_dict(),
    schedule=FlowMatchSchedule(shift=6.0),
    recommended=Recommended(
        resolution=512,
        size_multiple=SIZE_MULTIPLE,
        learning_rate=1e-4,
        learning_rate_full=5e-6,
        guidance=4.0,
        steps=50,
        rank=16,
        caption_dropout=0.1,
        weighting_scheme="uniform",
        usual_guidance=(2.0, 6.0),
    ),
)
OF_TURBO = replace(
    OF_BASE,
    schedule=FlowMatchSchedule(shift=3.0),
    recommended=replace(
        OF_BASE.recommended,
        guidance=0.0,
        steps=8,
        caption_dropout=0.0,
        most_guidance=0.0,
        usual_guidance=(0.0, 0.0),
        train_instead="z-image",
        assistant_lora="ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors",
    ),
)

PUBLISHED = {BASE: OF_BASE, TURBO: OF_TURBO}
"""By repository."""
