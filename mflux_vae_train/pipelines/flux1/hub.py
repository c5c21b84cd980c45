"""FLUX.1 pipelines whose parts are downloaded from the hub when the first of them is needed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from mflux_vae.pretrained.hub import download
from mflux_vae_train.pipelines.flux1 import folder, weights
from mflux_vae_train.pipelines.flux1.configs import PUBLISHED, REPOSITORIES, published, repository_of
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.loading.snapshot import SMALL_FILES, Snapshot

logger = logging.getLogger(__name__)


def open_repository(model: str, *, revision: str | None = None, variant: str | None = None) -> FluxPipeline:
    """Open `schnell`, `dev` or `owner/name`. Configurations are downloaded now unless they are in `PUBLISHED`.

    Args:
        revision, variant: see `flux1.load`.

    Raises:
        WeightsError: see `mflux_vae.pretrained.hub.download`.
    """
    repository = repository_of(model) or model
    configs = PUBLISHED.get(repository) if revision is None else None
    if configs is None:
        configs = folder.read_configs(download(repository, SMALL_FILES, revision))
    snapshot = Snapshot(
        repository,
        revision=revision,
        variant=variant,
        stems=weights.STEMS,
        single_files=list(weights.SINGLE_FILES.values()),
        is_stored=weights.is_stored,
    )
    parts = folder.open_parts(configs, snapshot, variant=variant)
    return FluxPipeline(parts, configs, name=model, snapshot=snapshot, base_model=repository)


def open_file(file: Path) -> FluxPipeline:
    """Open a transformer in a file; the other parts are those of the published model that it derives from.

    Raises:
        WeightsError: the file is broken, or holds no FLUX.1 transformer.
    """
    transformer = weights.config_from_weights(file)
    configs = replace(published(transformer.guidance_embeds), transformer=transformer)
    snapshot = Snapshot(
        REPOSITORIES["dev" if transformer.guidance_embeds else "schnell"],
        revision=None,
        variant=None,
        stems={part: stem for part, stem in weights.STEMS.items() if part != "transformer"},
        is_stored=weights.is_stored,
    )
    logger.info("%s: all parts but the transformer are those of %s", file, snapshot.repository)
    parts = folder.open_parts(configs, snapshot, transformer_file=file)
    return FluxPipeline(parts, configs, name=file.stem, snapshot=snapshot)
