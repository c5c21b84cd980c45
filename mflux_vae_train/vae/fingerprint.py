"""Identity of a run: settings, images and initial weights. A resumed run must have the same."""

from __future__ import annotations

import os
import zlib
from heapq import nsmallest
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mflux_vae.errors import SettingsError
from mflux_vae_train.checkpointing.differences import BY_FILE
from mflux_vae_train.fingerprint import file_hash, settings_identity, weights_hash
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.config_warnings import without_effect
from mflux_vae_train.vae.data.batches import Source
from mflux_vae_train.vae.data.sources import Arrays, Files

RESUMABLE_CHANGES = frozenset(
    {
        *("experiment_name", "output_dir", "samples_every", "save_every", "tensorboard", "cpu", "allow_changes"),
        *("save_every_n_steps", "log_images_every_n_steps", "dry_run", "resume_from_checkpoint", "caffeinate"),
        *(
            "data",
            "init_from",
            "network_config",
            "lpips",
            "data_list",
            "data_kind",
            "data_count",
        ),  # the content counts, not the path
    }
)
"""Settings that may change when a run is resumed: they do not affect the result."""

_CONTENTS = frozenset({"lpips", "data_list"})
"""Settings that name files: an identity has the hashes of their contents under these names."""

LENGTH_INDEPENDENT_SCHEDULES = frozenset({"constant", "exponential", "step"})
"""Schedules that do not depend on the number of epochs, which may then change on resume."""

_HASHED_FILES = 256
"""Number of files whose content is hashed; of all files the sizes count."""


def run_identity(settings: VAETrainingSettings, network: nn.Module, train: Source, held_out: Source) -> dict[str, Any]:
    """Plain values by name, compared when a run is resumed. `network` has its initial weights."""
    identity = settings_identity(settings, RESUMABLE_CHANGES | _free(settings))
    if settings.init_from or settings.network_config:
        identity["initial weights"] = weights_hash(network)
    contents: dict[str, Any] = {}
    for name in ("data_list", "lpips"):
        files = getattr(settings, name) or ()
        contents[name] = [_hash(file) for file in ([files] if isinstance(files, str) else files)] or None
    images = f"{len(train)} and {len(held_out)}, {data_checksum(train):08x} and {data_checksum(held_out):08x}"
    rows = [row for source in _sources(train, held_out) for row in _rows(source)]
    return {**contents, "images": images, **({f"images{BY_FILE}": rows} if rows else {}), **identity}


def resumable_changes(settings: VAETrainingSettings) -> frozenset[str]:
    """Settings that may change when this run is resumed, and the names of files whose contents count."""
    return (RESUMABLE_CHANGES | _free(settings) | without_effect(settings).keys()) - _CONTENTS


def _free(settings: VAETrainingSettings) -> frozenset[str]:
    return frozenset({"num_epochs"} if settings.lr_scheduler in LENGTH_INDEPENDENT_SCHEDULES else ())


def _hash(file: str) -> str:
    """Start of a file's SHA-256.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        return file_hash(Path(file))[:16]
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read ({error.strerror})") from error


def data_checksum(source: Source) -> int:
    """Checksum of images: arrays entirely; files by their sizes and the content of some; others by some images."""
    indices, base = np.arange(len(source)), source
    while (inner := getattr(base, "source", None)) is not None:  # unwrap subsets and caches
        indices, base = getattr(base, "indices", np.arange(len(base)))[indices], inner
    if isinstance(base, Arrays):
        return zlib.crc32(np.ascontiguousarray(base.pictures[indices]).data)
    sample = np.unique(np.linspace(0, len(indices) - 1, min(_HASHED_FILES, len(indices))).astype(np.int64))
    if not isinstance(base, Files):
        images = (base.item(int(index)).tobytes() for index in indices[sample[:: max(1, len(sample) // 8)]])
        return _crc(images)
    sizes = np.array([_size(base, int(index)) for index in indices], np.int64)
    return _crc([sizes.tobytes(), *(_content(base, int(index)) for index in indices[sample])])


def _sources(*parts: Source) -> list[Source]:
    """The sources below subsets and caches, each once."""
    found: dict[int, Source] = {}
    for part in parts:
        while (inner := getattr(part, "source", None)) is not None:
            part = inner
        found[id(part)] = part
    return list(found.values())


def _rows(source: Source) -> list[list[str]]:
    """(name, hash) of files, or images of an array: of all up to `_HASHED_FILES`, else of those with the lowest hash
    of their names, so that most stay when files are added. They explain differences and are not compared."""
    if isinstance(source, Arrays):
        some = np.unique(np.linspace(0, len(source) - 1, min(_HASHED_FILES, len(source))).astype(np.int64))
        return [[f"image {index}", f"{zlib.crc32(source.pictures[index].tobytes()):08x}"] for index in some]
    if not isinstance(source, Files):
        return []
    names = (_file_name(source, index) for index in range(len(source)))
    chosen = nsmallest(_HASHED_FILES, ((zlib.crc32(name.encode()), index, name) for index, name in enumerate(names)))
    chosen.sort(key=lambda one: one[1])
    return [[name, f"{zlib.crc32(_content(source, index)):08x}"] for _, index, name in chosen]


def _file_name(files: Files, index: int) -> str:
    path, root = files.paths[index], getattr(files.paths, "root", None)
    return os.fsencode(path.name if root is None else path.relative_to(root)).decode(errors="replace")


def _crc(parts: Any) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _size(files: Files, index: int) -> int:
    """File size; -1 for a missing file, which the source skips."""
    try:
        return files.paths[index].stat().st_size
    except OSError:
        return -1


def _content(files: Files, index: int) -> bytes:
    try:
        return files.paths[index].read_bytes()
    except OSError:
        return b""
