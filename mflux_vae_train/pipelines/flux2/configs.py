"""The published FLUX.2 klein models: repositories, configurations and recommended settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mflux_vae.pretrained.presets import PRESETS
from mflux_vae_train.pipelines.flux2.schedule import Flux2Schedule
from mflux_vae_train.pipelines.flux2.transformer import Flux2TransformerConfig
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.text.qwen3 import QWEN3_4B, QWEN3_8B, Qwen3Config

BASE_4B, BASE_9B = "black-forest-labs/FLUX.2-klein-base-4B", "black-forest-labs/FLUX.2-klein-base-9B"
DISTILLED_4B, DISTILLED_9B = "black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-9B"

REPOSITORIES = {
    "flux2-klein-4b": BASE_4B,
    "flux2-klein-9b": BASE_9B,
    "flux2-klein-4b-distilled": DISTILLED_4B,
    "flux2-klein-9b-distilled": DISTILLED_9B,
}
"""Names that `--model` accepts, and their repositories."""

SIZE_MULTIPLE = 16
"""Pixels per latent, which is also a token, in each direction."""


@dataclass(frozen=True, kw_only=True)
class Configs:
    """Configurations of a FLUX.2 klein pipeline.

    Attributes:
        vae: accepted by `mflux_vae.pretrained.loading.new_network`.
        is_distilled: whether the model was distilled to draw in few steps without guidance.
    """

    transformer: Flux2TransformerConfig
    text_encoder: Qwen3Config
    vae: Mapping[str, Any]
    schedule: Flux2Schedule = field(default_factory=Flux2Schedule)
    is_distilled: bool = False
    recommended: Recommended


BASE = Recommended(
    resolution=512,
    size_multiple=SIZE_MULTIPLE,
    learning_rate=1e-4,
    learning_rate_full=5e-6,
    guidance=4.0,
    steps=50,
    rank=16,
    weighting_scheme="flux_shift",
    usual_guidance=(1.0, 5.0),
)
"""Published: rank 16 at a rate of 3e-4 for a style (500 to 800 steps), 32 at 2e-4 for a face (800 to 1200)."""

TRANSFORMER_9B = Flux2TransformerConfig(
    num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=3 * QWEN3_8B.hidden_size
)

_4B = Configs(
    transformer=Flux2TransformerConfig(),
    text_encoder=QWEN3_4B,
    vae=PRESETS["flux2"].config.to_dict(),
    recommended=BASE,
)
_9B = replace(_4B, transformer=TRANSFORMER_9B, text_encoder=QWEN3_8B)


def _distilled(configs: Configs, base: str) -> Configs:
    """Configurations of the distilled sibling of the base model with this name."""
    recommended = replace(
        configs.recommended,
        guidance=1.0,
        steps=4,
        most_guidance=1.0,
        usual_guidance=(0.0, 1.0),
        train_instead=base,
    )
    return replace(configs, is_distilled=True, recommended=recommended)


PUBLISHED = {
    BASE_4B: _4B,
    BASE_9B: _9B,
    DISTILLED_4B: _distilled(_4B, "flux2-klein-4b"),
    DISTILLED_9B: _distilled(_9B, "flux2-klein-9b"),
}
"""By repository. A further model of this architecture is one row here, and in `GATED` if it is."""

GATED = frozenset({BASE_9B, DISTILLED_9B})
"""Repositories under a non-commercial licence that has to be accepted before a download."""


_DISTILLED = {BASE_4B: DISTILLED_4B, BASE_9B: DISTILLED_9B}


def distilled_of(repository: str | None) -> str | None:
    """The published model that draws in few steps with adapters of this published model."""
    return _DISTILLED.get(repository or "", repository if repository in _DISTILLED.values() else None)


def published_repository(config: Flux2TransformerConfig, distilled: bool) -> str:
    """The published model whose transformer has this width."""
    base = BASE_9B if config.width >= TRANSFORMER_9B.width else BASE_4B
    return _DISTILLED[base] if distilled else base
