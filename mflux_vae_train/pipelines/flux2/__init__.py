"""FLUX.2 [klein], 4B and 9B."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux2.pipeline import Flux2KleinPipeline


def load(
    model: str, *, revision: str | None = None, variant: str | None = None, vae: str | None = None
) -> Flux2KleinPipeline:
    """Open a model, see `flow.files.load`."""
    from mflux_vae_train.pipelines.flow import files
    from mflux_vae_train.pipelines.flux2.family import FAMILY
    from mflux_vae_train.pipelines.flux2.pipeline import Flux2KleinPipeline

    return files.load(FAMILY, Flux2KleinPipeline, model, revision=revision, variant=variant, vae=vae)


def refuse(model: str) -> NoReturn:
    """Refuse FLUX.2 [dev].

    Raises:
        SettingsError: in any case.
    """
    from mflux_vae.errors import SettingsError

    raise SettingsError(
        f"{model}: FLUX.2 [dev] with its text encoder Mistral is not supported; use --model flux2-klein-4b"
    )


def opens(place: Path) -> bool:
    """Whether a file, or a folder that mflux saved without `model_index.json`, holds FLUX.2."""
    from mflux_vae_train.pipelines.flow import files
    from mflux_vae_train.pipelines.flux2.family import FAMILY

    return files.opens(FAMILY, place)


def knows(repository: str) -> bool:
    """Whether a repository on the hub is a model whose configurations are known without a download."""
    from mflux_vae_train.pipelines.flux2.family import FAMILY

    return FAMILY.repository_of(repository) is not None
