"""Latents of pictures in one safetensors file, and how such a file comes about, picture by picture.

One tensor (C, h, w) per picture, under the picture's name. The metadata have `format` (`FORMAT`), `settings` (JSON:
what the latents depend on) and `pictures` (JSON: by name, `size` [height, width] and `crc32` of the picture's file).
While a file is written, finished pictures lie in a folder beside it, `.NAME.parts`, one small file each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mflux_vae.errors import WeightsError
from mflux_vae.weights.formats.files import read_safetensors, write_safetensors

FORMAT = "mflux-vae latents 1"


@dataclass(frozen=True, eq=False)
class Entry:
    """A picture's latents.

    Attributes:
        latents: (C, h, w), scaled for the denoiser.
        size: height and width of the picture in pixels.
        crc32: of the picture's file.
    """

    latents: mx.array
    size: tuple[int, int]
    crc32: int


def read(path: str | Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Entries by name of the picture, in the order they were given in, and settings.

    Raises:
        WeightsError: no such file, a broken one, or one that holds something else.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path}: not a file of latents that `mflux-vae encode` wrote")
    try:
        settings, pictures = json.loads(metadata["settings"]), json.loads(metadata["pictures"])
        if not isinstance(settings, dict):
            raise TypeError("settings are no object")
        entries = {
            name: Entry(tensors[name], (int(told["size"][0]), int(told["size"][1])), int(told["crc32"]))
            for name, told in pictures.items()
        }
        if wrong := [name for name in entries if Path(name).is_absolute() or {"", "..", "."} & set(name.split("/"))]:
            raise ValueError(f"{wrong[0]!r} is no name of a picture")
        if wrong := [name for name, entry in entries.items() if entry.latents.ndim != 3]:
            raise ValueError(f"latents of {wrong[0]} have {entries[wrong[0]].latents.ndim} axes")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path}: its metadata do not describe its latents ({reason})") from error
    return entries, settings


def write(path: str | Path, entries: Mapping[str, Entry], settings: Mapping[str, Any]) -> None:
    """Write a file; its name appears only when it is complete."""
    pictures = {name: {"size": list(entry.size), "crc32": entry.crc32} for name, entry in entries.items()}
    metadata = {"format": FORMAT, "settings": json.dumps(settings), "pictures": json.dumps(pictures)}
    write_safetensors(path, {name: entry.latents for name, entry in entries.items()}, metadata)


class Unfinished:
    """A file of latents on its way: what is added survives an interruption.

    Args:
        path: the file to be. Pictures that are already in it count as added where settings and picture are the same.
        settings: what the latents depend on.

    Raises:
        WeightsError: `path` exists and is something else.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path = Path(path)
        self.settings = dict(settings)
        self.parts = self.path.with_name(f".{self.path.name}.parts")
        self.entries: dict[str, Entry] = {}
        if self.path.exists():
            self._take(self.path)
        for part in sorted(self.parts.glob("*.safetensors")):
            try:
                self._take(part)
            except WeightsError:  # cut short by a power failure, say: made again
                part.unlink()

    def has(self, name: str, crc32: int) -> bool:
        """Whether this very picture needs no more work."""
        return name in self.entries and self.entries[name].crc32 == crc32

    def add(self, name: str, entry: Entry) -> None:
        """Keep a picture's latents, on disk."""
        file = f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
        write(self.parts / file, {name: entry}, self.settings)
        self.entries[name] = entry

    def finish(self, names: list[str]) -> None:
        """Write the file with these pictures, in this order, and remove what led to it."""
        write(self.path, {name: self.entries[name] for name in names}, self.settings)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _take(self, file: Path) -> None:
        entries, settings = read(file)
        if settings == self.settings:
            mx.eval([entry.latents for entry in entries.values()])  # read now, as the file will be replaced
            self.entries.update(entries)
