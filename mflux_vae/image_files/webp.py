"""WebP files: the chunks that hold pixels, and those that describe them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

from mflux_vae.image_files.container import MAX_PROFILE, MAX_TEXT, Container, Part, read_at, size_of

_PIXELS = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
_KNOWN = (*_PIXELS, b"ICCP", b"EXIF", b"XMP ")
_MAX_SEARCH, _MAX_TRIES, _MAX_REPAIRS = 2**24, 256, 8
"""Bytes that are searched for the next chunk after one whose length is wrong, places that are tried, and searches."""

_METADATA_FLAGS = 0x2C
"""Bits of VP8X: profile, EXIF and XMP follow."""


class _Chunk(NamedTuple):
    kind: bytes
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + 8 + self.length + self.length % 2


def webp(file: BinaryIO) -> Container | None:
    """Take a WebP file apart; None if it is of the simple form, which has no metadata."""
    size, parts = size_of(file), list[Part]()
    if read_at(file, 12, 4) != b"VP8X":
        return None
    found: dict[bytes, bytes] = {}
    frames = 0
    for chunk in _chunks(file, size):
        if chunk.kind == b"VP8X":
            head = read_at(file, chunk.start, min(chunk.end, size) - chunk.start)
            parts.append(head[:8] + bytes([head[8] & ~_METADATA_FLAGS]) + head[9:] if len(head) > 8 else head)
        elif chunk.kind in _PIXELS:
            frames += chunk.kind == b"ANMF"
            parts.append(range(chunk.start, min(chunk.end, size)))
        else:
            found.setdefault(chunk.kind, read_at(file, chunk.start + 8, min(chunk.length, MAX_PROFILE)))
    length = 4 + sum(len(part) for part in parts)
    exif = found.get(b"EXIF", b"")[:MAX_TEXT].removeprefix(b"Exif\0\0")
    return Container(
        parts=[b"RIFF" + struct.pack("<I", length) + b"WEBP", *parts],
        exif=exif or None,
        xmp=found.get(b"XMP ", b"")[:MAX_TEXT] or None,
        profile=found.get(b"ICCP"),
        frames=frames > 1,
    )


def _chunks(file: BinaryIO, size: int) -> Iterator[_Chunk]:
    """Yield the chunks of a file, those with wrong lengths left out."""
    start, described, repairs = 12, None, 0
    while start + 8 <= size:
        kind, length = struct.unpack("<4sI", read_at(file, start, 8))
        chunk = _Chunk(kind, start, length)
        if not all(32 <= byte < 127 for byte in kind) or (chunk.end > size + 1 and kind not in _PIXELS):
            # the chunk before may have the wrong length
            start, described, repairs = _next_pixels(file, described or start + 4, size), None, repairs + 1
            if start < 0 or repairs > _MAX_REPAIRS:
                return
            continue
        yield chunk
        described = None if kind in _PIXELS else start + 8
        start = chunk.end


def _next_pixels(file: BinaryIO, start: int, size: int) -> int:
    """Position of the next chunk that holds pixels and after which a known one or the end follows; else -1."""
    window = read_at(file, start, _MAX_SEARCH)
    for found in islice(re.finditer(rb"ANIM|ANMF|ALPH|VP8 |VP8L", window), _MAX_TRIES):
        place = start + found.start()
        end = _Chunk(found[0], place, int.from_bytes(read_at(file, place + 4, 4), "little")).end
        if size - 1 <= end <= size + 1 or read_at(file, end, 4) in _KNOWN:
            return place
    return -1
