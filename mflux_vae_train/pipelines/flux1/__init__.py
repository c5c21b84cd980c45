"""FLUX.1: transformer, schedule and pipeline, driven by the configurations in a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline


def load(model: str, *, revision: str | None = None, variant: str | None = None) -> FluxPipeline:
    """Open a published model by name, a folder, or a repository on the hub: what the entry points name.

    Nothing large is downloaded or read before it is needed; of a published model, nothing at all.

    Args:
        model: `schnell`, `dev`, a folder in diffusers' layout or saved by mflux, `owner/name`, or a file of the
            transformer alone: the other parts are then those of the published model.
        revision: of the repository: a branch, a tag or a commit.
        variant: of the weights files, such as "fp16".

    Raises:
        SettingsError: a revision of a folder.
        WeightsError: the folder is incomplete, or its weights are not FLUX.1's; or the repository cannot be reached.
    """
    from mflux_vae_train.pipelines.flux1 import hub
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

    place = Path(model).expanduser()
    if place.is_dir():
        return FluxPipeline.from_pretrained(place, variant=variant)
    if place.is_file():
        return hub.open_file(place)
    return hub.open_repository(model, revision=revision, variant=variant)


def opens(place: Path) -> bool:
    """Whether a folder without `model_index.json` is FLUX.1's all the same (mflux's saves have none), or a file is."""
    from mflux_vae_train.pipelines.flux1 import folder, weights

    return weights.is_transformer(place) if place.is_file() else folder.opens(place)
