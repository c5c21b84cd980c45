"""Latent files: latents of several images in one safetensors file, written image by image.

One tensor (C, h, w) per image, or a vector (C,), under its name. Metadata: `format` (`FORMAT`), `settings` (JSON: what
the latents depend on) and `pictures` (JSON: by name, `size` [height, width] and `crc32` of the image file). Until the
file is complete, finished images are kept in the folder `.NAME.parts` beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mflux_vae.errors import WeightsError
from mflux_vae.utils.text_files import parse_json
from mflux_vae.weights.formats.files import header, read_safetensors, write_safetensors
from mflux_vae.weights.formats.lazy_tensor import check_numbers

FORMAT = "mflux-vae latents 1"


@dataclass(frozen=True, eq=False)
class Entry:
    """Latents of an image.

    Attributes:
        latents: (C, h, w) or (C,), scaled for the denoiser.
        size: (height, width) of the image, pixels.
        crc32: checksum of the image file.
    """

    latents: mx.array
    size: tuple[int, int]
    crc32: int


def is_latent_file(path: str | Path) -> bool:
    """Whether this is a file that `write` wrote. Reads its metadata only."""
    with suppress(WeightsError, OSError):
        return Path(path).is_file() and header(Path(path))[1].get("format") == FORMAT
    return False


def read(path: str | Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Read entries by image name, in order, and settings.

    Raises:
        WeightsError: the file is missing, broken, or no latent file, or holds other values than finite floats.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path} was not written by `mflux-vae encode`")
    check_numbers(tensors, str(path), "latents")
    try:
        settings, pictures = parse_json(metadata["settings"]), parse_json(metadata["pictures"])
        if not isinstance(settings, dict):
            raise TypeError("settings are not an object")
        entries = {
            name: Entry(tensors[name], (int(row["size"][0]), int(row["size"][1])), int(row["crc32"]))
            for name, row in pictures.items()
        }
        if wrong := [name for name in entries if Path(name).is_absolute() or {"", "..", "."} & set(name.split("/"))]:
            raise ValueError(f"{wrong[0]!r} is not a valid image name")
        if wrong := [name for name, entry in entries.items() if entry.latents.ndim not in (1, 3)]:
            raise ValueError(f"latents of {wrong[0]} have {entries[wrong[0]].latents.ndim} axes")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path}: metadata and latents do not match ({reason})") from error
    return entries, settings


def write(path: str | Path, entries: Mapping[str, Entry], settings: Mapping[str, Any]) -> None:
    """Write a latent file atomically."""
    pictures = {name: {"size": list(entry.size), "crc32": entry.crc32} for name, entry in entries.items()}
    metadata = {"format": FORMAT, "settings": json.dumps(settings), "pictures": json.dumps(pictures)}
    write_safetensors(path, {name: entry.latents for name, entry in entries.items()}, metadata)


class Unfinished:
    """A latent file in progress; added images survive an interruption.

    Args:
        path: final file. Its images are kept if settings and image are unchanged.
        settings: what the latents depend on.

    Attributes:
        replaced: names of images in `path` that another model or other settings encoded.

    Raises:
        WeightsError: `path` exists and is no latent file.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path = Path(path)
        self.settings = dict(settings)
        self.parts = self.path.with_name(f".{self.path.name}.parts")
        self.entries: dict[str, Entry] = {}
        self.replaced = self._load(self.path) if self.path.exists() else []
        for part in sorted(self.parts.glob("*.safetensors")):
            try:
                self._load(part)
            except WeightsError:  # truncated, for example by a power failure: encoded again
                part.unlink()

    def has(self, name: str, crc32: int) -> bool:
        """Whether this image is encoded."""
        return name in self.entries and self.entries[name].crc32 == crc32

    def add(self, name: str, entry: Entry) -> None:
        """Save the latents of an image."""
        file = f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
        write(self.parts / file, {name: entry}, self.settings)
        self.entries[name] = entry

    def finish(self, names: list[str]) -> None:
        """Write the final file with these images, in order, and remove the parts."""
        write(self.path, {name: self.entries[name] for name in names}, self.settings)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _load(self, file: Path) -> list[str]:
        """Take the images of a file; returns the names of those of other settings, which are not taken."""
        entries, settings = read(file)
        if settings != self.settings:
            return list(entries)
        mx.eval([entry.latents for entry in entries.values()])  # evaluate before the file is replaced
        self.entries.update(entries)
        return []
