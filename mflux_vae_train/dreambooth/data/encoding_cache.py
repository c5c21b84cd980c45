"""Encoded pictures and prompts on disk: by what they are of and what encoded them, for this run and others.

A file is named by the hash of all that its arrays depend on, written whole or not at all, and never changed. So a
stopped run loses nothing that was finished, several runs may share a folder, and what is deleted or broken is
encoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mflux_vae.errors import WeightsError
from mflux_vae.weights.formats.files import read_safetensors, write_safetensors

VERSION = 1
"""Of what the files hold; part of every name."""


class EncodingCache:
    """Named arrays by key, below a folder; without a folder nothing is kept.

    Attributes:
        found, written: how many keys were asked for and there, and how many were put.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.hits = self.writes = 0

    def get(self, key: Mapping[str, object]) -> dict[str, mx.array] | None:
        """What was put under a key; None if nothing was, or it cannot be read."""
        if self.folder is None or not (path := self._path(key)).is_file():
            return None
        try:
            arrays, _ = read_safetensors(path)
            mx.eval(arrays)
        except (WeightsError, OSError, RuntimeError, ValueError):
            return None
        self.hits += 1
        return arrays

    def put(self, key: Mapping[str, object], arrays: Mapping[str, mx.array]) -> None:
        """Keep arrays under a key.

        Raises:
            OSError: they cannot be written.
        """
        if self.folder is None:
            return
        path = self._path(key)
        own = path.with_name(f".{path.stem}.{os.getpid()}.safetensors")  # another run may write the same key
        try:
            write_safetensors(own, arrays)
            os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)
        self.writes += 1

    def _path(self, key: Mapping[str, object]) -> Path:
        assert self.folder is not None
        text = json.dumps({"version": VERSION, **key}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
