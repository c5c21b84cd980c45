"""TIFF files: the tags that pixels depend on, and those that describe them."""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

from mflux_vae.image_files.container import MAX_PROFILE, MAX_TEXT, Container, Part, read_at, size_of
from mflux_vae.image_files.exif import TYPE_SIZES

_PIXEL_TAGS = frozenset(
    {
        *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284),  # size, depth, compression, strips
        *(292, 293, 317, 320, 322, 323, 324, 325),  # fax, predictor, palette, tiles
        *(332, 334, 338, 339, 340, 341, 347),  # inks, opacity, kinds of numbers, tables of JPEG
        *(512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),  # old JPEG, YCbCr
    }
)
_SUBFILE, _ORIENTATION, _XMP, _PROFILE = 254, 274, 700, 34675

_MAX_TAGS = 4096


class _Layout(NamedTuple):
    """Sizes of the fields of TIFF, or of BigTIFF."""

    order: str
    header: int
    number_of_tags: str
    entry: int
    offset: str

    def number(self, kind: str, data: bytes) -> int:
        return struct.unpack(self.order + kind, data)[0]


def tiff(file: BinaryIO) -> Container | None:
    """Take a TIFF file apart: its pixels stay where they are, and a shorter directory is appended.

    Returns None if the first directory cannot be read.
    """
    size, head = size_of(file), read_at(file, 0, 16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16:
        return None
    big = 43 in head[2:4]
    layout = _Layout(order, 16, "Q", 20, "Q") if big else _Layout(order, 8, "H", 12, "I")
    width = struct.calcsize(layout.offset)
    entries = _entries(file, layout, layout.number(layout.offset, head[layout.header - width : layout.header]))
    if entries is None:
        return None
    tags, following = entries
    kept = [entry for tag, entry in tags if tag in _PIXEL_TAGS]
    directory = struct.pack(order + layout.number_of_tags, len(kept)) + b"".join(kept) + bytes(width)
    gap = -size % 16
    parts: list[Part] = [
        head[: layout.header - width] + struct.pack(order + layout.offset, size + gap),
        range(layout.header, size),
        bytes(gap) + directory,
    ]
    described = {tag: entry for tag, entry in tags if tag in (_ORIENTATION, _XMP, _PROFILE)}
    profile = _value(file, layout, described.get(_PROFILE), MAX_PROFILE)
    return Container(
        parts=parts,
        exif=_as_exif(layout, described.get(_ORIENTATION)),
        xmp=_value(file, layout, described.get(_XMP), MAX_TEXT) or None,
        profile=profile,
        frames=_is_page(file, layout, following),
    )


def _entries(file: BinaryIO, layout: _Layout, start: int) -> tuple[list[tuple[int, bytes]], int] | None:
    """Tags of a directory with their entries, and the position of the next directory; None if it is cut or too long."""
    width = struct.calcsize(layout.number_of_tags)
    head = read_at(file, start, width) if start < 2**62 else b""
    if len(head) < width or not 0 < (count := layout.number(layout.number_of_tags, head)) <= _MAX_TAGS:
        return None
    body = read_at(file, start + width, count * layout.entry)
    if len(body) < count * layout.entry:
        return None
    entries = [body[place : place + layout.entry] for place in range(0, len(body), layout.entry)]
    after = read_at(file, start + width + len(body), struct.calcsize(layout.offset))
    following = layout.number(layout.offset, after) if len(after) == struct.calcsize(layout.offset) else 0
    return [(layout.number("H", entry[:2]), entry) for entry in entries], following


def _value(file: BinaryIO, layout: _Layout, entry: bytes | None, limit: int) -> bytes | None:
    """Bytes of a value; None without an entry, empty if it is cut, too long or of another type."""
    if entry is None:
        return None
    width = struct.calcsize(layout.offset)
    kind, count = layout.number("H", entry[2:4]), layout.number(layout.offset, entry[4 : 4 + width])
    length = TYPE_SIZES.get(kind, 0) * count
    if not 0 < length <= limit:
        return b""
    if length <= width:
        return entry[4 + width :][:length]
    start = layout.number(layout.offset, entry[4 + width :])
    data = read_at(file, start, length) if start < 2**62 else b""
    return data if len(data) == length else b""


def _as_exif(layout: _Layout, entry: bytes | None) -> bytes | None:
    """An EXIF block that holds one entry."""
    if entry is None:
        return None
    width = struct.calcsize(layout.offset)
    count = layout.number(layout.offset, entry[4 : 4 + width])
    short = entry[:4] + struct.pack(layout.order + "I", min(count, 2**32 - 1)) + entry[4 + width :][:4]
    mark = {"<": b"II", ">": b"MM"}[layout.order]
    return mark + struct.pack(layout.order + "HIH", 42, 8, 1) + short + bytes(4)


def _is_page(file: BinaryIO, layout: _Layout, start: int) -> bool:
    """Whether a directory describes another page, and not a smaller version of the first."""
    entries = _entries(file, layout, start) if start else None
    if entries is None:
        return False
    subfile = next((entry for tag, entry in entries[0] if tag == _SUBFILE), None)
    value = subfile[-struct.calcsize(layout.offset) :][:4] if subfile else bytes(4)
    return not layout.number("I", value) & 1
