"""The embedded pipeline: FLUX.1's classes with small numbers, trained on a procedural world of captioned scenes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

WEIGHTS = Path(__file__).parent / "weights"
"""The pipeline's folder, in diffusers' layout."""

VAE_WEIGHTS = WEIGHTS / "vae"
"""Its autoencoder's folder: what the preset `tiny` of `mflux_vae` names."""


def load(model: str = "tiny") -> FluxPipeline:
    """Open the embedded pipeline: what the entry point `tiny` names."""
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(WEIGHTS)
    pipeline.name = model
    return pipeline
