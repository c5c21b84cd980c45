"""Zip archives of weights, whose entries are not compressed: where in the file the bytes of each one lie."""

from __future__ import annotations

import struct
import zipfile
from typing import IO

from mflux_vae.weights.formats.safe_reading import Refused

MAGIC = b"PK\x03\x04"

_HEADER = 30
"""Bytes of an entry's own header before its name."""

_LARGEST_PART = 2**28


class Archive:
    """An open zip archive, of which nothing is unpacked.

    Args:
        file: open for reading, and as long as the archive is used.
        writer: what should have written it, for messages.

    Attributes:
        names: of the entries.

    Raises:
        zipfile.BadZipFile: it is none.
    """

    def __init__(self, file: IO[bytes], writer: str):
        with zipfile.ZipFile(file) as archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
        self.names = list(self._entries)
        self._file, self._writer, self._length = file, writer, file.seek(0, 2)

    def place(self, name: str) -> tuple[int, int]:
        """First byte and size of an entry; its own header is looked at, as the directory does not know its length.

        Raises:
            Refused: there is no such entry, it is compressed, or not where the directory says.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise Refused(f"{name} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Refused(f"{name} is compressed, which {self._writer} never does")
        self._file.seek(entry.header_offset)
        header = self._file.read(_HEADER)
        if len(header) != _HEADER or header[:4] != MAGIC:
            raise Refused(f"{name} is not where the archive's directory says")
        first = entry.header_offset + _HEADER + sum(struct.unpack("<HH", header[26:]))
        if first + entry.file_size > self._length:
            raise Refused(f"{name} reaches beyond the end of the file")
        return first, entry.file_size

    def read(self, name: str) -> bytes:
        """The bytes of an entry that is no array.

        Raises:
            Refused: as `place`, or it is larger than any such entry.
        """
        first, size = self.place(name)
        if size > _LARGEST_PART:
            raise Refused(f"{name} has {size} bytes, more than any list of tensors needs")
        self._file.seek(first)
        return self._file.read(size)
