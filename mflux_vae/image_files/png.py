"""PNG files: the chunks that hold pixels, those that describe them, and texts."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

from mflux_vae.image_files import profiles
from mflux_vae.image_files.container import MAX_PROFILE, MAX_TEXT, Container, Part, read_at, size_of

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")

_MAX_SEARCH, _MAX_TRIES, _MAX_REPAIRS = 2**24, 64, 8
"""Bytes that are searched for the next chunk after one whose length is wrong, places that are tried, and searches."""

_MAX_COLOUR = 64
"""Largest chunk that states a colour space without a profile (bytes)."""


class Chunk(NamedTuple):
    kind: bytes
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + 12 + self.length


class Text(NamedTuple):
    """A text chunk: its type (`tEXt`, `zTXt` or `iTXt`) and its text."""

    kind: bytes
    text: str


def png(file: BinaryIO) -> Container:
    """Take a PNG file apart."""
    size, parts = size_of(file), list[Part]([SIGNATURE])
    exif = xmp = None
    colour: dict[bytes, bytes] = {}
    frames, header = False, b""
    for chunk in chunks(file, size):
        if chunk.kind in _PIXELS:
            header = header or _body(file, chunk, 13)
            parts.append(range(chunk.start, min(chunk.end, size)))
        elif chunk.kind == b"tRNS":
            if opacity := _opacity(header, _body(file, chunk, 256)):
                parts.append(_chunk(b"tRNS", opacity))
        elif chunk.kind == b"eXIf":
            exif = _body(file, chunk, MAX_TEXT).removeprefix(b"Exif\0\0")
        elif chunk.kind in _TEXTS:
            name = _body(file, chunk, 80).partition(b"\0")[0]
            if name == b"XML:com.adobe.xmp":
                xmp = _text(file, chunk)[1]
            elif name in (b"Raw profile type exif", b"Raw profile type APP1") and exif is None:
                exif = _from_hexadecimal(_text(file, chunk)[1])
        elif chunk.kind == b"acTL":
            frames = int.from_bytes(_body(file, chunk, 4), "big") > 1
        elif chunk.kind == b"iCCP" or (_states_colours(file, chunk)):
            colour.setdefault(chunk.kind, _body(file, chunk, MAX_PROFILE))
    return Container(parts=parts, exif=exif, xmp=xmp, profile=_profile(colour), frames=frames)


def texts(file: BinaryIO) -> dict[str, Text]:
    """Text chunks before the pixels, by keyword. Long ones are left out."""
    found: dict[str, Text] = {}
    for chunk in chunks(file, size_of(file)):
        if chunk.kind == b"IDAT":
            break
        if chunk.kind in _TEXTS and chunk.length <= MAX_TEXT:
            name, text = _text(file, chunk)
            encoding = "utf-8" if chunk.kind == b"iTXt" else "latin-1"
            found.setdefault(name.decode("latin-1"), Text(chunk.kind, text.decode(encoding, "replace")))
    return found


def chunks(file: BinaryIO, size: int) -> Iterator[Chunk]:
    """Yield the chunks of a file up to its end, those with wrong lengths left out."""
    start, described, repairs = len(SIGNATURE), None, 0
    while start + 12 <= size:
        length, kind = struct.unpack(">I4s", read_at(file, start, 8))
        chunk = Chunk(kind, start, length)
        if not (kind.isalpha() and kind.isascii()) or (chunk.end > size and kind not in _PIXELS):
            # the chunk before may have the wrong length
            start, described, repairs = _next_pixels(file, described or start, size), None, repairs + 1
            if start < 0 or repairs > _MAX_REPAIRS:
                return
            continue
        yield chunk
        if kind == b"IEND":
            return
        described = None if kind in _PIXELS else start + 8
        start = chunk.end


def _next_pixels(file: BinaryIO, start: int, size: int) -> int:
    """Position of the next chunk that holds pixels and is intact; -1 if there is none."""
    window = read_at(file, start, _MAX_SEARCH)
    for found in islice(re.finditer(rb"(?s)....(?:PLTE|IDAT|IEND)", window), _MAX_TRIES):
        length, kind = struct.unpack(">I4s", found[0])
        chunk = Chunk(kind, start + found.start(), length)
        if chunk.end <= size and _sound(file, chunk):
            return chunk.start
    return -1


def _states_colours(file: BinaryIO, chunk: Chunk) -> bool:
    return chunk.kind in (b"cICP", b"gAMA", b"cHRM", b"sRGB") and chunk.length <= _MAX_COLOUR and _sound(file, chunk)


def _body(file: BinaryIO, chunk: Chunk, limit: int) -> bytes:
    return read_at(file, chunk.start + 8, min(chunk.length, limit))


def _sound(file: BinaryIO, chunk: Chunk) -> bool:
    """Whether the checksum is right."""
    data = read_at(file, chunk.start + 4, 8 + chunk.length)
    return len(data) == 8 + chunk.length and data[-4:] == struct.pack(">I", zlib.crc32(data[:-4]))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _opacity(header: bytes, body: bytes) -> bytes:
    """A tRNS chunk with levels as Pillow scales them; empty if it does not fit the header."""
    depth, colours = header[8:10] if len(header) >= 10 else (0, 0)
    if colours == 3:
        return body
    count = {0: 2, 2: 6}.get(colours, 0)
    if len(body) < count:
        return b""
    levels = struct.unpack(f">{count // 2}H", body[:count])
    if colours == 0 and 1 < depth < 8:
        levels = tuple((level & (1 << depth) - 1) * 255 // ((1 << depth) - 1) for level in levels)
    elif colours == 2 and depth == 16:
        levels = tuple(level >> 8 for level in levels)
    return struct.pack(f">{count // 2}H", *levels)


def _text(file: BinaryIO, chunk: Chunk) -> tuple[bytes, bytes]:
    """Keyword and text of a chunk, cut at `MAX_TEXT`; the text is empty if it cannot be unpacked."""
    name, _, rest = _body(file, chunk, MAX_TEXT).partition(b"\0")
    packed = chunk.kind == b"zTXt"
    if chunk.kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif packed:
        rest = rest[1:]
    return name, (_unpacked(rest, MAX_TEXT) or b"") if packed else rest


def _unpacked(data: bytes, limit: int) -> bytes | None:
    """zlib data, cut at a limit; None if they are broken or longer."""
    unpacker = zlib.decompressobj()
    try:
        result = unpacker.decompress(data, limit)
    except zlib.error:
        return None
    return result if unpacker.eof else None


def _from_hexadecimal(text: bytes) -> bytes | None:
    """EXIF block as ImageMagick writes it: a name, a length, and digits."""
    try:
        return bytes.fromhex("".join(text.decode("ascii").split("\n")[3:])).removeprefix(b"Exif\0\0")
    except ValueError:
        return None


def _profile(colour: dict[bytes, bytes]) -> bytes | None:
    """The profile that the chunks state; by the standard cICP comes first, then iCCP, sRGB, gAMA and cHRM."""
    if len(code := colour.get(b"cICP", b"")) == 4 and code[2:] == b"\0\1" and (coded := profiles.coded(*code[:2])):
        return coded
    if (body := colour.get(b"iCCP")) is not None:
        return _unpacked(body.partition(b"\0")[2][1:], MAX_PROFILE) or b""
    gamma, primaries = colour.get(b"gAMA", b""), colour.get(b"cHRM", b"")
    if b"sRGB" in colour or not (len(gamma) == 4 or len(primaries) == 32):
        return None
    exponent = int.from_bytes(gamma, "big") / 1e5 if len(gamma) == 4 else None
    return profiles.stated(exponent, [value / 1e5 for value in struct.unpack(">8I", primaries)] if primaries else None)
