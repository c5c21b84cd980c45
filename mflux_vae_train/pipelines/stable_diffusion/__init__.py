"""Stable Diffusion 1.x, 2.x and SDXL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mflux_vae.errors import SettingsError, WeightsError

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline


def load(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
) -> StableDiffusionPipeline:
    """Open a published model by name, a folder, a file, or a repository on the hub.

    Weights are downloaded and read when they are first used.

    Args:
        model: `sd1.5`, `sd2.1`, `sd2.1-base`, `sdxl`, `owner/name`, a folder in diffusers' layout, or a checkpoint in
            one file (safetensors, ckpt).
        revision: of the repository: a branch, a tag or a commit.
        variant: of the weights files, such as "fp16".
        vae: another autoencoder, see `parts.open_vae`.
        prediction_type: "epsilon" or "v_prediction", for a file that does not state it.

    Raises:
        SettingsError: a configuration needs an unsupported option, it is another kind of Stable Diffusion, or the other
            autoencoder does not fit.
        WeightsError: the folder is incomplete, the file is broken, or the repository cannot be reached.
    """
    from mflux_vae_train.pipelines.stable_diffusion.files import hub
    from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline, from_opened

    place = Path(model).expanduser()
    if prediction_type is not None and not place.is_file():
        raise SettingsError(f"--prediction_type {prediction_type}: {model} states what it predicts; leave it out")
    if place.is_dir():
        pipeline = StableDiffusionPipeline.from_pretrained(place, variant=variant)
    elif place.is_file():
        pipeline = from_opened(hub.open_file(place, prediction_type=prediction_type))
    else:
        pipeline = from_opened(hub.open_repository(model, revision=revision, variant=variant))
    if vae is not None:
        pipeline.replace_vae(vae)
    return pipeline


def opens(place: Path) -> bool:
    """Whether a file holds Stable Diffusion. A folder without `model_index.json` does not."""
    from mflux_vae.weights.formats.files import open_weights
    from mflux_vae_train.pipelines.stable_diffusion.files import detect

    try:
        return place.is_file() and detect.is_known(open_weights(place)[0].keys())
    except WeightsError:
        return False


def knows(repository: str) -> bool:
    """Whether a repository on the hub is a model whose configurations are known without a download."""
    from mflux_vae_train.pipelines.stable_diffusion import configs

    return configs.repository_of(repository) is not None
