"""Odd and broken pictures, each as a file, with what reading it must give.

`PICTURES` is name of the file -> `Odd(write, error)`: `write(path)` makes it, `error` is None where the picture is
accepted, else what the message says right after the file's name (`"{path} {error}..."`). `write_all(folder)` makes
every one. Drive them through anything that reads pictures: `load_images`, `VAE.encode_images`, the command line.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RED = (255, 0, 0)
WHITE = (255, 255, 255)
NOT_AN_IMAGE = "not an image"
TRUNCATED = "cannot be read"


@dataclass(frozen=True, kw_only=True)
class Odd:
    """A file's maker, the start of its error, and for accepted ones the size (H, W) and the colour of every
    pixel, within 2 levels."""

    write: Callable[[Path], object]
    error: str | None = None
    size: tuple[int, int] = (24, 40)
    colour: tuple[int, int, int] = RED


def write_all(folder: Path) -> dict[Path, Odd]:
    """Every odd picture in `folder`."""
    for name, odd in PICTURES.items():
        odd.write(folder / name)
    return {folder / name: odd for name, odd in PICTURES.items()}


def deep_png(samples: np.ndarray, kind: int) -> bytes:
    """A PNG of (H, W, C) uint16, which Pillow does not write in colour; `kind` is the format's colour type."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, kind, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _image(mode: str, value: Any, size: tuple[int, int] = (40, 24), **options: Any) -> Callable[[Path], object]:
    return lambda path: Image.new(mode, size, value).save(path, **options)


def _deep(value: tuple[int, ...], kind: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(deep_png(np.tile(np.array(value, np.uint16), (24, 40, 1)), kind))


def _turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 40), RED).save(path, exif=exif)


def _palette(path: Path) -> None:
    image = Image.new("P", (40, 24), 1)
    image.putpalette([0, 0, 0, *RED])
    image.save(path)


def _palette_opacity(path: Path) -> None:
    image = Image.new("P", (40, 24), 1)
    image.putpalette([0, 0, 0, *RED])
    image.save(path, transparency=1)


def _animated(path: Path) -> None:
    frames = [Image.new("RGB", (40, 24), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


def _noise(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


def _claimed(width: int, height: int) -> bytes:
    """A PNG's header alone: it says how large the picture is, and nothing follows."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", b"")


def _wrong_checksum() -> bytes:
    content = bytearray(_noise("PNG"))
    content[content.index(b"IDAT") + 50] ^= 0xFF
    return bytes(content)


PICTURES: dict[str, Odd] = {
    # readable
    "turned.jpg": Odd(write=_turned),
    "transparent.png": Odd(write=_image("RGBA", (0, 0, 255, 0)), colour=WHITE),
    "half_transparent.png": Odd(write=_image("RGBA", (255, 0, 0, 127)), colour=(255, 128, 128)),
    "palette.gif": Odd(write=_palette),
    "palette_transparent.png": Odd(write=_palette_opacity, colour=WHITE),
    "cmyk.jpg": Odd(write=_image("CMYK", (0, 0, 0, 255)), colour=(0, 0, 0)),
    "cmyk.tiff": Odd(write=_image("CMYK", (0, 255, 255, 0))),
    "one_bit.png": Odd(write=_image("1", 1), colour=WHITE),
    "grey.png": Odd(write=_image("L", 77), colour=(77, 77, 77)),
    "grey_transparent.png": Odd(write=_image("LA", (77, 0)), colour=WHITE),
    "grey_16_bit.png": Odd(write=_image("I;16", 77 * 257), colour=(77, 77, 77)),
    "grey_32_bit.tiff": Odd(write=_image("I", 77 * 257), colour=(77, 77, 77)),
    "rgb_16_bit.png": Odd(write=_deep((65535, 0, 77 * 257), 2), colour=(255, 0, 77)),
    "rgba_16_bit.png": Odd(write=_deep((65535, 0, 0, 65535), 6)),
    "animated.gif": Odd(write=_animated),
    "animated.webp": Odd(write=_animated),
    "pages.tiff": Odd(write=_animated),
    "one_pixel.png": Odd(write=_image("RGB", RED, (1, 1)), size=(1, 1)),
    "one_row.png": Odd(write=_image("RGB", RED, (33, 1)), size=(1, 33)),
    "wide.png": Odd(write=_image("RGB", RED, (20_000, 3)), size=(3, 20_000)),
    "jpeg_called.png": Odd(write=_image("RGB", WHITE, format="JPEG"), colour=WHITE),
    "ycbcr.jpg": Odd(write=_image("YCbCr", (255, 128, 128)), colour=WHITE),
    # refused
    "empty.png": Odd(write=_bytes(b""), error="is empty"),
    "text.png": Odd(write=_bytes(b"no picture at all\n"), error=NOT_AN_IMAGE),
    "page.jpg": Odd(write=_bytes(b"<!DOCTYPE html><title>404</title>"), error=NOT_AN_IMAGE),
    "drawing.webp": Odd(write=_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), error=NOT_AN_IMAGE),
    "zeros.jpg": Odd(write=_bytes(bytes(4096)), error=NOT_AN_IMAGE),
    "signature.png": Odd(write=_bytes(b"\x89PNG\r\n\x1a\n"), error=NOT_AN_IMAGE),
    "cut.png": Odd(write=_bytes(_noise("PNG")[:4000]), error=TRUNCATED),
    "cut.jpg": Odd(write=_bytes(_noise("JPEG")[:2000]), error=TRUNCATED),
    "cut.gif": Odd(write=_bytes(_noise("GIF")[:2000]), error=TRUNCATED),
    "cut.webp": Odd(write=_bytes(_noise("WEBP")[:2000]), error=TRUNCATED),
    "cut.bmp": Odd(write=_bytes(_noise("BMP")[:2000]), error=TRUNCATED),
    "cut.tiff": Odd(write=_bytes(_noise("TIFF")[:2000]), error=TRUNCATED),
    "checksum.png": Odd(write=_bytes(_wrong_checksum()), error=TRUNCATED),
    "bomb.png": Odd(write=_bytes(_claimed(20_000, 20_000)), error="pixels"),
    "no_size.png": Odd(write=_bytes(_claimed(0, 24)), error=NOT_AN_IMAGE),
    "floats.tiff": Odd(write=_image("F", 0.5), error="floating-point"),
    "folder.png": Odd(write=lambda path: path.mkdir(exist_ok=True), error=TRUNCATED),
}
