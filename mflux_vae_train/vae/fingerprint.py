"""What makes a run of an autoencoder this run: its settings, its images, the weights that it began from."""

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

FREE = frozenset(
    {
        *("experiment_name", "output_dir", "samples_every", "save_every", "tensorboard", "cpu", "allow_changes"),
        *("save_every_n_steps", "log_images_every_n_steps", "dry_run"),
        *("data", "init_from", "network_config", "lpips", "data_list"),  # what is there counts, not where it lies
    }
)
"""Settings that may change when a run is continued: they do not shape its result."""

LASTING = frozenset({"constant", "exponential", "step"})
"""Schedules that do not depend on the length of the run, which may then be made longer."""

_READ = 256
"""Files whose content is looked at; of all others it is the size."""


def identity(settings: VAETrainingSettings, network: nn.Module, train: Source, held_out: Source) -> dict[str, Any]:
    """Plain values by name, to be compared when the run goes on. `network` is as it was built."""
    free = FREE | ({"num_epochs"} if settings.lr_scheduler in LASTING else set())
    shaping = settings_identity(settings, free)
    if settings.init_from or settings.network_config:
        shaping["initial weights"] = weights_hash(network)
    for name in ("lpips", "data_list"):
        files = getattr(settings, name) or ()
        shaping[name] = [_hash(file) for file in ([files] if isinstance(files, str) else files)] or None
    images = f"{len(train)} and {len(held_out)}, {fingerprint(train):08x} and {fingerprint(held_out):08x}"
    return {**shaping, "images": images}


def _hash(file: str) -> str:
    """
    Raises:
        SettingsError: it cannot be read.
    """
    try:
        return file_hash(Path(file))[:16]
    except OSError as error:
        raise SettingsError(f"{file} cannot be read ({error.strerror})") from error


def fingerprint(source: Source) -> int:
    """A checksum of a source's images: of arrays all of it; of files their sizes, and the bytes of some."""
    places, below = np.arange(len(source)), source
    while (inner := getattr(below, "source", None)) is not None:  # a subset, or pictures that are kept
        places, below = getattr(below, "indices", np.arange(len(below)))[places], inner
    if isinstance(below, Arrays):
        return zlib.crc32(np.ascontiguousarray(below.pictures[places]).data)
    some = np.unique(np.linspace(0, len(places) - 1, min(_READ, len(places))).astype(np.int64))
    if not isinstance(below, Files):
        drawn = (below.item(int(place)).tobytes() for place in places[some[:: max(1, len(some) // 8)]])
        return _crc(drawn)
    sizes = np.array([_size(below, int(place)) for place in places], np.int64)
    return _crc([sizes.tobytes(), *(_content(below, int(place)) for place in places[some])])


def _crc(parts: Any) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _size(files: Files, place: int) -> int:
    """-1 where the file is gone: a source leaves it out when it comes to it."""
    try:
        return files.paths[place].stat().st_size
    except OSError:
        return -1


def _content(files: Files, place: int) -> bytes:
    try:
        return files.paths[place].read_bytes()
    except OSError:
        return b""
