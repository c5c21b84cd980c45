"""FLUX.1 [schnell] and [dev]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline


def load(
    model: str, *, revision: str | None = None, variant: str | None = None, vae: str | None = None
) -> FluxPipeline:
    """Open `schnell`, `dev`, or what `flow.files.load` opens; arguments and errors as there."""
    from mflux_vae_train.pipelines.flow import files
    from mflux_vae_train.pipelines.flux1.parts import FAMILY
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

    return files.load(FAMILY, FluxPipeline, model, revision=revision, variant=variant, vae=vae)


def opens(place: Path) -> bool:
    """Whether a file, or a folder that mflux saved without `model_index.json`, holds FLUX.1."""
    from mflux_vae_train.pipelines.flow import files
    from mflux_vae_train.pipelines.flux1.parts import FAMILY

    return files.opens(FAMILY, place)


def knows(repository: str) -> bool:
    """Whether a repository on the hub is a FLUX.1 model whose configurations are known without a download."""
    from mflux_vae_train.pipelines.flux1.parts import FAMILY

    return FAMILY.repository_of(repository) is not None
