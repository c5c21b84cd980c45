"""EXIF blocks: the orientation and the colour space, whatever else is damaged."""

from __future__ import annotations

import re
import struct

TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of the types of TIFF and EXIF values, by code."""

_ORIENTATION, _EXIF, _INTEROPERABILITY, _COLOUR_SPACE, _INTEROPERABILITY_INDEX = 0x112, 0x8769, 0xA005, 0xA001, 1

_BYTE, _ASCII, _SHORT, _LONG = 1, 2, 3, 4

_MAX_TAGS = 1024

_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def orientation(exif: bytes | None, xmp: bytes | None = None) -> int:
    """The orientation, 1 to 8, that EXIF or else XMP states; 1 (upright) if neither does so legibly."""
    value = _number(_first_directory(exif), _ORIENTATION)
    if value is None and xmp and (found := _XMP_ORIENTATION.search(xmp)):
        value = int(found[1])
    return value if value is not None and 1 <= value <= 8 else 1


def is_adobe_rgb(exif: bytes | None) -> bool:
    """Whether EXIF states Adobe RGB, as cameras do that write no profile."""
    inner = _directory(exif, _number(_first_directory(exif), _EXIF))
    if _number(inner, _COLOUR_SPACE) == 2:
        return True
    names = _directory(exif, _number(inner, _INTEROPERABILITY))
    kind, count, value = names.get(_INTEROPERABILITY_INDEX, (0, 0, b""))
    return kind == _ASCII and count == 4 and value[:3] == b"R03"


def _order(exif: bytes) -> str:
    return "<" if exif[:2] == b"II" else ">"


def _first_directory(exif: bytes | None) -> dict[int, tuple[int, int, bytes]]:
    if exif is None or exif[:4] not in (b"II*\0", b"MM\0*") or len(exif) < 8:
        return {}
    return _directory(exif, struct.unpack(_order(exif) + "I", exif[4:8])[0])


def _directory(exif: bytes | None, start: int | None) -> dict[int, tuple[int, int, bytes]]:
    """Type, count and bytes 8 to 11 of each entry, by tag, as far as they are there."""
    if exif is None or start is None or start + 2 > len(exif):
        return {}
    order, found = _order(exif), dict[int, tuple[int, int, bytes]]()
    count = min(struct.unpack(order + "H", exif[start : start + 2])[0], _MAX_TAGS)
    for place in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, number = struct.unpack(order + "HHI", exif[place : place + 8])
        value = exif[place + 8 : place + 12]
        if kind in (_BYTE, _SHORT, _LONG) and number == 1:
            value = struct.pack(
                ">I", struct.unpack(order + {1: "B", 3: "H", 4: "I"}[kind], value[: TYPE_SIZES[kind]])[0]
            )
        found.setdefault(tag, (kind, number, value))
    return found


def _number(directory: dict[int, tuple[int, int, bytes]], tag: int) -> int | None:
    """The value of a tag that holds one whole number."""
    kind, count, value = directory.get(tag, (0, 0, b""))
    return int.from_bytes(value, "big") if kind in (_BYTE, _SHORT, _LONG) and count == 1 else None
