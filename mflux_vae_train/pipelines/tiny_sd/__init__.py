"""The second embedded pipeline: a small Stable Diffusion, trained on the same world as `tiny` (see `tiny_world`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline

WEIGHTS = Path(__file__).parent / "weights"
"""The pipeline's folder, in diffusers' layout."""

VAE_WEIGHTS = WEIGHTS / "vae"
"""Folder of its autoencoder, the preset `tiny-sd` of `mflux_vae`."""


def load(model: str = "tiny-sd") -> StableDiffusionPipeline:
    """Open the embedded pipeline."""
    from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS)
    pipeline.name = model
    return pipeline
