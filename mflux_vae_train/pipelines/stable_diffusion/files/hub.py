"""Stable Diffusion from the hub, and from single files whose other parts are on the hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mflux_vae.pretrained.hub import download
from mflux_vae_train.pipelines.loading.snapshot import SMALL_FILES, Snapshot
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.stable_diffusion.configs import PUBLISHED, Configs, repository_of
from mflux_vae_train.pipelines.stable_diffusion.files import folder
from mflux_vae_train.pipelines.stable_diffusion.files.parts import is_stored, open_parts, stems
from mflux_vae_train.pipelines.stable_diffusion.files.single_file import open_single_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a pipeline is built from.

    Attributes:
        snapshot: where parts are downloaded from.
        base_model: repository of the published model that all parts belong to, or None.
        notes: sentences about what a file does not specify, for warnings.
    """

    parts: Parts
    configs: Configs
    name: str
    snapshot: Snapshot
    base_model: str | None = None
    notes: Sequence[str] = ()


def open_repository(model: str, *, revision: str | None = None, variant: str | None = None) -> Opened:
    """Open a name of `configs.REPOSITORIES` or `owner/name`. Configurations of `PUBLISHED` are not downloaded.

    Args:
        revision: a branch, a tag or a commit.
        variant: of the weights files, such as "fp16".

    Raises:
        WeightsError: see `mflux_vae.pretrained.hub.download` and `folder.read_configs`.
    """
    repository = repository_of(model) or model
    configs = PUBLISHED.get(repository) if revision is None else None
    if configs is None:
        configs = folder.read_configs(download(repository, SMALL_FILES, revision))
    snapshot = Snapshot(repository, revision=revision, variant=variant, stems=stems(configs), is_stored=is_stored)
    parts = open_parts(configs, snapshot, variant=variant)
    return Opened(parts=parts, configs=configs, name=model, snapshot=snapshot, base_model=repository)


def open_file(file: Path, *, prediction_type: str | None = None) -> Opened:
    """Open a single file; parts that it lacks, and tokenizers, are those of the published model that it derives from.

    Args:
        prediction_type: see `detect.detect`.

    Raises:
        WeightsError, SettingsError: see `open_single_file`.
    """
    single = open_single_file(file, prediction_type=prediction_type)
    missing = {part: stem for part, stem in stems(single.configs).items() if part in single.missing}
    snapshot = Snapshot(single.base, revision=None, variant=None, stems=missing, is_stored=is_stored)
    logger.info("%s: %s are those of %s", file, ", ".join([*missing, "tokenizers"]), single.base)
    parts = open_parts(single.configs, snapshot, single_file=single)
    return Opened(parts=parts, configs=single.configs, name=file.stem, snapshot=snapshot, notes=single.notes)
