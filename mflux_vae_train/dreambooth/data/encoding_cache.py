"""Encoded images and prompts on disk, reused by this run and by others.

A file is named by the hash of everything that its arrays depend on, and is written atomically. An interrupted run
keeps what it encoded, several runs can share a folder, and missing or broken files are encoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mflux_vae.errors import WeightsError
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae.weights.formats.files import read_safetensors, write_safetensors
from mflux_vae.weights.formats.lazy_tensor import check_numbers

_IDS = (mx.int32, mx.uint32)
"""dtypes of token ids, which pipelines store beside floats."""

VERSION = 2
"""Version of the file contents, a part of every key. Since 2, images are converted to sRGB."""


class EncodingCache:
    """Named arrays by key in a folder; without a folder nothing is kept.

    Attributes:
        hits, writes: numbers of keys found and written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.hits = self.writes = 0

    def get(self, key: Mapping[str, object]) -> dict[str, mx.array] | None:
        """The arrays of a key; None if they are missing or cannot be read."""
        if self.folder is None or not (path := self._path(key)).is_file():
            return None
        try:
            arrays, _ = read_safetensors(path)
            with device_errors():
                mx.eval(arrays)
            check_numbers({name: one for name, one in arrays.items() if one.dtype not in _IDS}, str(path), "encodings")
        except (WeightsError, OSError, RuntimeError, ValueError):
            return None
        self.hits += 1
        return arrays

    def put(self, key: Mapping[str, object], arrays: Mapping[str, mx.array]) -> None:
        """Write the arrays of a key.

        Raises:
            OSError: the file cannot be written.
        """
        if self.folder is None:
            return
        path = self._path(key)
        partial = path.with_name(f".{path.stem}.{os.getpid()}.safetensors")  # another run may write the same key
        try:
            write_safetensors(partial, arrays)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self.writes += 1

    def _path(self, key: Mapping[str, object]) -> Path:
        assert self.folder is not None
        text = json.dumps({"version": VERSION, **key}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
