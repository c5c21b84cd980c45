"""FLUX.1 [schnell] and [dev]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline


def load(
    model: str, *, revision: str | None = None, variant: str | None = None, vae: str | None = None
) -> FluxPipeline:
    """Open a published model by name, a folder, a file, or a repository on the hub.

    Weights are downloaded and read when they are first used, and for published models configurations, too.

    Args:
        model: `schnell`, `dev`, `owner/name`, a folder in diffusers' layout or saved by mflux, or a file of the
            transformer; the other parts are then those of the published model.
        revision: of the repository: a branch, a tag or a commit.
        variant: of the weights files, such as "fp16".
        vae: another autoencoder, see `parts.open_vae`.

    Raises:
        SettingsError: a configuration needs an unsupported option, or the other autoencoder does not fit.
        WeightsError: the folder is incomplete, its weights are not FLUX.1's, or the repository cannot be reached.
    """
    from mflux_vae_train.pipelines.flux1 import hub
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

    place = Path(model).expanduser()
    if place.is_dir():
        pipeline = FluxPipeline.from_pretrained(place, variant=variant)
    elif place.is_file():
        pipeline = hub.open_file(place)
    else:
        pipeline = hub.open_repository(model, revision=revision, variant=variant)
    if vae is not None:
        pipeline.replace_vae(vae)
    return pipeline


def opens(place: Path) -> bool:
    """Whether a file, or a folder that mflux saved without `model_index.json`, holds FLUX.1."""
    from mflux_vae_train.pipelines.flux1 import folder, weights

    return weights.is_transformer(place) if place.is_file() else folder.opens(place)


def knows(repository: str) -> bool:
    """Whether a repository on the hub is a FLUX.1 model whose configurations are known without a download."""
    from mflux_vae_train.pipelines.flux1 import configs

    return configs.repository_of(repository) is not None
