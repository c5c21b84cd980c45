"""The embedded pipeline: a small FLUX.1, trained on captioned scenes of a procedural world (see `tiny_world`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

WEIGHTS = Path(__file__).parent / "weights"
"""The pipeline's folder, in diffusers' layout."""

VAE_WEIGHTS = WEIGHTS / "vae"
"""Folder of its autoencoder, the preset `tiny` of `mflux_vae`."""


def load(model: str = "tiny") -> FluxPipeline:
    """Open the embedded pipeline."""
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(WEIGHTS)
    pipeline.name = model
    return pipeline
