"""FLUX.1: transformer, schedule and pipeline, driven by the configurations in a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mflux_vae.errors import SettingsError

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

PUBLISHED = {"schnell": "black-forest-labs/FLUX.1-schnell", "dev": "black-forest-labs/FLUX.1-dev"}
"""Names that `--model` takes, and the repositories they stand for."""

_FILES = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]


def load(model: str) -> FluxPipeline:
    """Open a published model by name, or a folder in diffusers' layout: what the entry points name.

    A published model is taken from the hub's local cache, or downloaded to it.

    Raises:
        SettingsError: the published model is neither in the cache nor can it be downloaded.
        WeightsError: the folder is incomplete, or its weights are not FLUX.1's.
    """
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

    folder = Path(model).expanduser()
    if model in PUBLISHED and not folder.is_dir():
        folder = _download(model)
    return FluxPipeline.from_pretrained(folder)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    repository = PUBLISHED[model]
    try:
        return Path(snapshot_download(repository, allow_patterns=_FILES))
    except Exception as error:  # its own errors, the HTTP client's and the system's have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingsError(
            f"--model {model}: {repository} is not in the hub's cache and could not be downloaded ({reason}); "
            "accept its licence, log in with `hf auth login`, or give the folder of a copy"
        ) from error
