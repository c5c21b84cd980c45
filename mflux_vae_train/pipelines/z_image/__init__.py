"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.z_image.pipeline import ZImagePipeline


def load(
    model: str, *, revision: str | None = None, variant: str | None = None, vae: str | None = None
) -> ZImagePipeline:
    """Open `z-image`, `z-image-turbo`, or what `flow.files.load` opens; arguments and errors as there."""
    from mflux_vae_train.pipelines.flow import files
    from mflux_vae_train.pipelines.z_image.family import FAMILY
    from mflux_vae_train.pipelines.z_image.pipeline import ZImagePipeline

    return files.load(FAMILY, ZImagePipeline, model, revision=revision, variant=variant, vae=vae)


def opens(place: Path) -> bool:
    """Whether a file, or a folder that mflux saved without `model_index.json`, holds Z-Image."""
    from mflux_vae_train.pipelines.flow import files
    from mflux_vae_train.pipelines.z_image.family import FAMILY

    return files.opens(FAMILY, place)


def knows(repository: str) -> bool:
    """Whether a repository on the hub is a Z-Image model whose configurations are known without a download."""
    from mflux_vae_train.pipelines.z_image.family import FAMILY

    return FAMILY.repository_of(repository) is not None
