"""Identity of a run: settings, images and initial weights. A resumed run must have the same."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mflux_vae.errors import SettingsError
from mflux_vae_train.fingerprint import file_hash, settings_identity, weights_hash
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.data.batches import Source
from mflux_vae_train.vae.data.sources import Arrays, Files

RESUMABLE_CHANGES = frozenset(
    {
        *("experiment_name", "output_dir", "samples_every", "save_every", "tensorboard", "cpu", "allow_changes"),
        *("save_every_n_steps", "log_images_every_n_steps", "dry_run"),
        *("data", "init_from", "network_config", "lpips", "data_list"),  # the content counts, not the path
    }
)
"""Settings that may change when a run is resumed: they do not affect the result."""

LENGTH_INDEPENDENT_SCHEDULES = frozenset({"constant", "exponential", "step"})
"""Schedules that do not depend on the number of epochs, which may then change on resume."""

_HASHED_FILES = 256
"""Number of files whose content is hashed; of all files the sizes count."""


def run_identity(settings: VAETrainingSettings, network: nn.Module, train: Source, held_out: Source) -> dict[str, Any]:
    """Plain values by name, compared when a run is resumed. `network` has its initial weights."""
    changeable = RESUMABLE_CHANGES | (
        {"num_epochs"} if settings.lr_scheduler in LENGTH_INDEPENDENT_SCHEDULES else set()
    )
    identity = settings_identity(settings, changeable)
    if settings.init_from or settings.network_config:
        identity["initial weights"] = weights_hash(network)
    for name in ("lpips", "data_list"):
        files = getattr(settings, name) or ()
        identity[name] = [_hash(file) for file in ([files] if isinstance(files, str) else files)] or None
    images = f"{len(train)} and {len(held_out)}, {data_checksum(train):08x} and {data_checksum(held_out):08x}"
    return {**identity, "images": images}


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
