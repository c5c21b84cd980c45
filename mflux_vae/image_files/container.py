"""An image file without its metadata: the bytes that hold the pixels, and apart from them what describes them."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import BinaryIO, TypeAlias

Part: TypeAlias = "bytes | range"
"""Bytes, or a range of positions in a file."""

MAX_PROFILE = 2**24
"""Largest colour profile that is read (bytes). Profiles of printers have up to 4 MB."""

MAX_TEXT = 2**20
"""Largest XMP packet that is read (bytes), and largest EXIF block."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """
    Attributes:
        parts: the file without metadata.
        exif: EXIF block, from its byte order mark on.
        xmp: XMP packet.
        profile: ICC profile, empty if it cannot be extracted; None if there is none.
        frames: whether further frames or pages follow the first.
    """

    parts: Sequence[Part]
    exif: bytes | None = None
    xmp: bytes | None = None
    profile: bytes | None = None
    frames: bool = False


def size_of(file: BinaryIO) -> int:
    """Length of a file."""
    return file.seek(0, io.SEEK_END)


def read_at(file: BinaryIO, start: int, count: int) -> bytes:
    """Up to `count` bytes from a position on."""
    file.seek(start)
    return file.read(max(count, 0))


def joined(file: BinaryIO, parts: Sequence[Part]) -> io.BufferedReader:
    """A file that consists of `parts`, which are read on demand."""
    return io.BufferedReader(_Joined(file, parts))


class _Joined(io.RawIOBase):
    def __init__(self, file: BinaryIO, parts: Sequence[Part]) -> None:
        self._file, self._parts, self._position = file, [part for part in parts if len(part)], 0
        self._ends = list(accumulate(len(part) for part in self._parts))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1] if self._ends else 0}
        if (position := origin[whence] + offset) < 0:
            raise OSError("negative position in an image file")
        self._position = position
        return position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        index = bisect_right(self._ends, self._position)
        if index == len(self._parts):
            return 0
        part, count = self._parts[index], min(len(buffer), self._ends[index] - self._position)
        start = self._position - (self._ends[index] - len(part))
        data = part[start : start + count] if isinstance(part, bytes) else read_at(self._file, part[start], count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
