"""Uncompressed zip archives of weights: byte ranges of their entries."""

from __future__ import annotations

import struct
import zipfile
from typing import IO

from mflux_vae.weights.formats.safe_reading import InvalidFile

MAGIC = b"PK\x03\x04"

_HEADER = 30
"""Bytes of an entry's header before its name."""

_MAX_READ = 2**28


class Archive:
    """An open zip archive.

    Args:
        file: open for reading while the archive is used.
        writer: program that should have written it, for messages.

    Attributes:
        names: entry names.

    Raises:
        zipfile.BadZipFile: not a zip archive.
    """

    def __init__(self, file: IO[bytes], writer: str):
        with zipfile.ZipFile(file) as archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
        self.names = list(self._entries)
        self._file, self._writer, self._length = file, writer, file.seek(0, 2)

    def byte_range(self, name: str) -> tuple[int, int]:
        """First byte and size of an entry, from the header before it.

        Raises:
            InvalidFile: the entry is missing, compressed, or not where the directory says.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise InvalidFile(f"{name} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise InvalidFile(f"{name} is compressed, which {self._writer} never does")
        self._file.seek(entry.header_offset)
        header = self._file.read(_HEADER)
        if len(header) != _HEADER or header[:4] != MAGIC:
            raise InvalidFile(f"{name} is not where the archive's directory says")
        first = entry.header_offset + _HEADER + sum(struct.unpack("<HH", header[26:]))
        if first + entry.file_size > self._length:
            raise InvalidFile(f"{name} exceeds the file")
        return first, entry.file_size

    def read(self, name: str) -> bytes:
        """Read a small entry.

        Raises:
            InvalidFile: as `byte_range`, or it is too large.
        """
        first, size = self.byte_range(name)
        if size > _MAX_READ:
            raise InvalidFile(f"{name} has {size} bytes, too many")
        self._file.seek(first)
        return self._file.read(size)
