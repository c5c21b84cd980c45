"""JPEG files: the segments that hold pixels, and those that describe them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from mflux_vae.image_files.container import MAX_TEXT, Container, Part, read_at, size_of

_EXIF, _XMP, _ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"

_APP0, _APP1, _APP2, _APP14, _APP15, _COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_START_OF_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITH_LENGTH = frozenset(range(0xC0, 0xFF)) - {*range(0xD0, 0xDA), *range(0xF0, 0xFE)}

_PLAIN_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
"""Says that colours are YCbCr, as every JFIF segment does."""

_MAX_DAMAGE = 2**20
"""Bytes that are searched for the segment after one whose length is wrong."""


class _Segment(NamedTuple):
    marker: int
    start: int
    end: int

    @property
    def metadata(self) -> bool:
        return _APP0 <= self.marker <= _APP15 or self.marker == _COMMENT


def jpeg(file: BinaryIO) -> Container | None:
    """Take a JPEG file apart; None if it has no sound sequence of segments."""
    size = size_of(file)
    segments = _segments(file, 2, size, set())
    if not _complete(segments):
        segments = _repaired(file, segments, size) or _segments(file, 2, size, set(), skip=True)
    if not _complete(segments):
        return None
    parts: list[Part] = [b"\xff\xd8"]
    exif = xmp = None
    profile, pieces = dict[int, bytes](), 0
    for segment in segments:
        if segment.marker == _START_OF_SCAN:
            parts.append(range(segment.start, size))
        elif not segment.metadata:
            parts.append(range(segment.start, segment.end))
        else:
            body = read_at(file, segment.start + 4, segment.end - segment.start - 4)
            if segment.marker == _APP0 and body.startswith(b"JFIF\0") and len(body) >= 14:
                parts.append(_PLAIN_JFIF)
            elif segment.marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:  # inks or YCbCr
                parts.append(b"\xff\xee\0\x0e" + body[:12])
            elif segment.marker == _APP1 and body.startswith(_EXIF):
                exif = exif or body[len(_EXIF) :][:MAX_TEXT]
            elif segment.marker == _APP1 and body.startswith(_XMP):
                xmp = xmp or body[len(_XMP) :]
            elif segment.marker == _APP2 and body.startswith(_ICC) and len(body) > 13:
                profile[body[12]] = body[14:]
                pieces = body[13]
    icc = b"".join(profile[number] for number in sorted(profile)) if len(profile) == pieces else b""
    return Container(parts=parts, exif=exif, xmp=xmp, profile=icc if profile else None)


def _segments(file: BinaryIO, start: int, size: int, seen: set[int], *, skip: bool = False) -> list[_Segment]:
    """The segments from a position up to the first scan, or as far as they make sense.

    Args:
        seen: positions to end at; those of the segments are added.
        skip: ignore bytes between two segments, as decoders do.
    """
    segments: list[_Segment] = []
    while start + 4 <= size and start not in seen:
        seen.add(start)
        head = read_at(file, start, 4)
        if head[0] != 0xFF or head[1] in (0, 0xFF):
            if not skip and head[:2] != b"\xff\xff":
                break
            start += 1
            continue
        marker, length = head[1], int.from_bytes(head[2:], "big")
        if marker not in _WITH_LENGTH or length < 2:
            break
        segments.append(_Segment(marker, start, min(start + 2 + length, size)))
        if marker == _START_OF_SCAN:
            break
        start += 2 + length
    return segments


def _complete(segments: Sequence[_Segment]) -> bool:
    """Whether the segments hold a frame and end at a scan."""
    return (
        bool(segments)
        and segments[-1].marker == _START_OF_SCAN
        and any(segment.marker in _FRAMES for segment in segments)
    )


def _repaired(file: BinaryIO, segments: Sequence[_Segment], size: int) -> list[_Segment]:
    """The segments of a file in which the length of one that describes pixels is wrong; empty if there are none.

    A thumbnail inside a segment is a JPEG file, too; the picture is the largest frame.
    """
    best: tuple[int, list[_Segment]] = (0, [])
    seen: set[int] = set()
    for index, damaged in enumerate(segments):
        if not damaged.metadata:
            continue
        window = read_at(file, damaged.start + 4, _MAX_DAMAGE)
        for found in re.finditer(rb"\xff[\xc0-\xcf\xdb\xdd\xe0-\xef\xfe]", window):
            start = damaged.start + 4 + found.start()
            rest = _segments(file, start, size, seen)
            if _complete(rest) and (area := _area(file, rest)) > best[0]:
                whole = _Segment(damaged.marker, damaged.start, start)
                best = area, [*segments[:index], whole, *rest]
    return best[1]


def _area(file: BinaryIO, segments: Sequence[_Segment]) -> int:
    start = next(segment.start for segment in segments if segment.marker in _FRAMES)
    body = read_at(file, start + 5, 4)
    return int.from_bytes(body[:2], "big") * int.from_bytes(body[2:], "big")
