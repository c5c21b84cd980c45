"""Read an image file upright, in sRGB. Metadata never decides whether pixels are read."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from mflux_vae.errors import ImageError
from mflux_vae.image_files import notes as kinds
from mflux_vae.image_files import profiles
from mflux_vae.image_files.container import Container, joined, read_at
from mflux_vae.image_files.exif import is_adobe_rgb, orientation
from mflux_vae.image_files.formats import HEAD, HEIF, RAW, format_of, readable, remedy
from mflux_vae.image_files.jpeg import jpeg
from mflux_vae.image_files.modes import to_levels, to_rgb
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.image_files.png import Text, png, texts
from mflux_vae.image_files.tiff import tiff
from mflux_vae.image_files.webp import webp
from mflux_vae.utils.links import missing

_CONTAINERS = {"JPEG": jpeg, "PNG": png, "WEBP": webp, "TIFF": tiff}

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each EXIF orientation upright."""

_SILENT = ("JPEG", "PNG", "WEBP")
"""Formats that Pillow decodes without a warning once they are open, so several at a time."""

_filtering = Lock()


def read_file(path: str | Path, notes: ImageNotes, *, mask: bool = False) -> Image.Image:
    """Read a file upright as RGB, or as grey levels (L) of a mask.

    Raises:
        ImageError: the file is missing or too large, or its pixels are broken or floating-point numbers.
    """
    with _opened(path, notes) as (image, container):
        with _noting(path, notes) if image.format not in _SILENT else nullcontext():
            image.load()
        profile = container.profile
        if profile is None and is_adobe_rgb(container.exif):
            profile = profiles.adobe_rgb()
        plain = to_levels(image, path) if mask else to_rgb(image, path, notes, profile=profile)
        frames = container.frames
        if not container.parts:
            with _noting(path, notes), suppress(Exception):  # of the second frame
                frames = getattr(image, "is_animated", False)
        if frames:
            notes.add(kinds.FRAMES, path)
        return _turned(plain, orientation(container.exif, container.xmp))


def read_image(image: Image.Image, name: str, notes: ImageNotes) -> Image.Image:
    """Make a Pillow image upright and RGB; errors as in `read_file`."""
    path = getattr(image, "filename", "")
    if image.format == "TIFF" and path and getattr(image, "tile", None) and image.tell() == 0 and os.path.isfile(path):
        return read_file(path, notes)  # Pillow reads tiles of a turned image wrong if it opened the file by name
    try:
        image.load()
        return _turned(to_rgb(image, name, notes, profile=image.info.get("icc_profile") or None), _orientation(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise ImageError(f"{name} cannot be read ({_one_line(error)})") from error


def content_hash(path: str | Path) -> str:
    """SHA-256 of what decides the pixels of an image file: the file without metadata, its orientation and colours.

    That of the whole file for a file without metadata, and for formats that are not taken apart.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        format = format_of(file.read(HEAD), path)
        container = None
        if format in _CONTAINERS and format != "TIFF":  # its metadata are among the pixels
            with suppress(struct.error, ValueError, IndexError):
                container = _CONTAINERS[format](file)
        source = file if container is None else joined(file, container.parts)
        source.seek(0)
        while block := source.read(1 << 22):
            digest.update(block)
        if container is not None:
            turn, profile = orientation(container.exif, container.xmp), container.profile
            described = turn, profile, profile is None and is_adobe_rgb(container.exif)
            if described != (1, None, False):
                digest.update(repr(described).encode())
    return digest.hexdigest()


def stored_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in a file, before its orientation; (0, 0) if it cannot be read."""
    with suppress(ImageError), _opened(path, ImageNotes()) as (image, _):
        return image.height, image.width
    return 0, 0


def image_text(path: str | Path) -> dict[str, str]:
    """Text chunks of a PNG file before its pixels, which are not read; empty for other formats."""
    return {name: chunk.text for name, chunk in text_chunks(path).items()}


def text_chunks(path: str | Path) -> dict[str, Text]:
    """The same with the type of each chunk."""
    with _opened(path, ImageNotes()) as (image, _):
        if image.format != "PNG":
            return {}
        with open(path, "rb") as file:
            return texts(file)


@contextmanager
def _opened(path: str | Path, notes: ImageNotes) -> Iterator[tuple[Image.Image, Container]]:
    """Open a file without its metadata. Every error, also of the caller with the image, is an `ImageError`."""
    format = None
    if not isinstance(path, str | os.PathLike):
        raise ImageError(
            f"expected a file name, not a {type(path).__name__}; load_images takes arrays and Pillow images"
        )
    try:
        with open(path, "rb") as file:
            source: BinaryIO = file if file.seekable() else io.BytesIO(file.read())
            format = format_of(read_at(source, 0, HEAD), path)
            if format == RAW:
                raise UnidentifiedImageError
            if format in HEIF and readable(format):
                _register_heif()
            yield _take_apart(source, format, path, notes)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path} {missing(path)}") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder, so it cannot be read as an image; give the files in it") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; make it smaller") from None
    except Exception as error:  # Pillow raises many kinds
        if format is not None and not readable(format):
            raise ImageError(f"{path} is {format}, which is not read; {remedy(format)}") from None
        if isinstance(error, UnidentifiedImageError):
            kind = f"a sound {format} image" if format in HEIF else "an image"
            what = f"is not {kind}, so it cannot be read" if os.path.getsize(path) else "is empty"
            raise ImageError(f"{path} {what}; remove or replace it") from None
        raise ImageError(f"{path} cannot be read ({_one_line(error)}); remove or replace it") from error


def _take_apart(
    source: BinaryIO, format: str | None, path: str | Path, notes: ImageNotes
) -> tuple[Image.Image, Container]:
    container = None
    with suppress(struct.error, ValueError, IndexError):
        container = _CONTAINERS[format](source) if format in _CONTAINERS else None
    if container is not None:
        assert format is not None
        return _open(joined(source, container.parts), [format], path, notes), container
    source.seek(0)
    image = _open(source, None, path, notes)
    exif, xmp, profile = (_bytes(image.info.get(name)) or None for name in ("exif", "xmp", "icc_profile"))
    return image, Container(parts=(), exif=exif, xmp=xmp, profile=profile)


def _open(file: BinaryIO, formats: list[str] | None, path: str | Path, notes: ImageNotes) -> Image.Image:
    with _noting(path, notes):
        return Image.open(file, formats=formats)


@contextmanager
def _noting(path: str | Path, notes: ImageNotes) -> Iterator[None]:
    """Add Pillow's warnings to the notes. One thread at a time, as Python's filters of warnings belong to all."""
    with _filtering, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        notes.add(kinds.PILLOW, path, str(warning.message))


@cache
def _register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()


def _orientation(image: Image.Image) -> int:
    """The orientation of a loaded Pillow image. Pillow's reader of EXIF, which warns, is for images without a block."""
    if (exif := _bytes(image.info.get("exif"))) is not None:
        return orientation(exif, _bytes(image.info.get("xmp")))
    with _filtering, warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        if isinstance(turn := image.getexif().get(0x112), int):
            return turn
    return 1


def _bytes(value: object) -> bytes | None:
    return value.removeprefix(b"Exif\0\0") if isinstance(value, bytes) else None


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
