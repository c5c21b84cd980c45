"""Damage the metadata of image files as careless tools do; pixels stay as they are.

    python -m tests.helpers.damage_metadata FOLDER COPY

writes a copy of the images of FOLDER, each with another damage. `DAMAGES` lists them by format.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

SIGNATURES = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"RI": "WEBP", b"II": "TIFF"}

Entry = tuple[int, int, int, bytes]
"""Tag, type, count and the four bytes of the value, or of its position."""

NOISE = np.random.default_rng(0).bytes(60_000)


def exif(entries: Sequence[Entry], *, rest: bytes = b"", following: int = 0, order: str = "<") -> bytes:
    """An EXIF block with one directory at 8, what follows it, and the position of the next directory."""
    rows = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(entries)) + rows + struct.pack(order + "I", following) + rest


def short(value: int) -> bytes:
    return struct.pack("<HH", value, 0)


UPRIGHT: Entry = (0x112, 3, 1, short(1))

EXIF: Mapping[str, bytes] = {
    "resolution as text": exif([UPRIGHT, (0x11A, 2, 9, b"abcd"), (0x11B, 5, 1, b"\xff\xff\xff\xff")]),
    "orientation as text": exif([(0x112, 2, 4, b"top\0")]),
    "orientation as fractions": exif([(0x112, 5, 70_000, b"\0\0\0\x10")]),
    "orientation out of range": exif([(0x112, 3, 1, short(77))]),
    "unknown types": exif([(tag, 200 + tag % 50, 2**32 - 1, b"\xff" * 4) for tag in range(0x100, 0x140)]),
    "endless directory": b"II*\0\x08\0\0\0\xff\xff" + NOISE[:400],
    "directory outside": b"MM\0*\xff\xff\xff\xf0",
    "cut": exif([UPRIGHT] * 9)[:31],
    "empty": b"",
    "other byte order": b"MM" + exif([UPRIGHT])[2:],
    "thumbnail outside": exif([UPRIGHT], following=26, rest=exif([(0x201, 4, 1, b"\xff" * 4)] * 2)[8:]),
    "positions to itself": exif([(0x8769, 4, 1, b"\x08\0\0\0"), (0x8825, 4, 1, b"\x08\0\0\0")], following=8),
    "places as numbers": exif(
        [(0x8825, 4, 1, b"\x1a\0\0\0")], rest=exif([(2, 3, 3, b"\xff" * 4), (4, 12, 9, b"abcd")])[8:]
    ),
    "maker note": exif([UPRIGHT, (0x927C, 7, 60_000, b"\x26\0\0\0")], rest=NOISE),
}

PROFILES: Mapping[str, bytes] = {
    "empty": b"",
    "cut": b"\0\0\x0c\x48lcms\2\x10\0\0mntrRGB XYZ " + bytes(40),
    "noise": NOISE[:3000],
    "endless tags": (b"\0\0\x0c\x48lcms\2\x10\0\0mntrRGB XYZ ".ljust(36, b"\0") + b"acsp").ljust(128, b"\0")
    + b"\xff" * 400,
}


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def _in_jpeg(*segments: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:2] + b"".join(segments) + data[2:]


def _profile_segments(profile: bytes) -> bytes:
    return segment(0xE2, b"ICC_PROFILE\0\1\1" + profile)


def chunk(kind: bytes, body: bytes, *, wrong: bool = False) -> bytes:
    """A PNG chunk, or one with a wrong checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


def _in_png(*chunks: bytes) -> Callable[[bytes], bytes]:
    """Behind the header."""
    return lambda data: data[:33] + b"".join(chunks) + data[33:]


def _at_end_of_png(*chunks: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:-12] + b"".join(chunks) + data[-12:]


def _in_webp(*parts: tuple[bytes, bytes]) -> Callable[[bytes], bytes]:
    """With a header that announces metadata."""

    def damaged(data: bytes) -> bytes:
        from PIL import Image

        with Image.open(_stream(data)) as image:
            width, height = image.size
        flags = (data[20] & 0x12 if data[12:16] == b"VP8X" else 0x10) | 0x2C
        extent = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        body = b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + extent
        body += data[30:] if data[12:16] == b"VP8X" else data[12:]
        for kind, content in parts:
            body += kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
        return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body

    return damaged


def _stream(data: bytes) -> object:
    import io

    return io.BytesIO(data)


def _in_tiff(*entries: Entry) -> Callable[[bytes], bytes]:
    """Replace or add entries of the first directory, little-endian."""

    def damaged(data: bytes) -> bytes:
        start = struct.unpack("<I", data[4:8])[0]
        count = struct.unpack("<H", data[start : start + 2])[0]
        rows = [data[place : place + 12] for place in range(start + 2, start + 2 + 12 * count, 12)]
        tags = {struct.unpack("<H", row[:2])[0]: row for row in rows}
        tags.update({entry[0]: struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries})
        data += bytes(len(data) % 2)
        directory = struct.pack("<H", len(tags)) + b"".join(tags[tag] for tag in sorted(tags)) + bytes(4)
        return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory

    return damaged


def _nested(exif: bytes) -> bytes:
    return b"Exif\0\0" + exif


DAMAGES: Mapping[str, Mapping[str, Callable[[bytes], bytes]]] = {
    "JPEG": {
        **{f"EXIF: {name}": _in_jpeg(segment(0xE1, _nested(block))) for name, block in EXIF.items()},
        **{f"profile: {name}": _in_jpeg(_profile_segments(profile)) for name, profile in PROFILES.items()},
        "profile: a piece is missing": _in_jpeg(segment(0xE2, b"ICC_PROFILE\0\2\3" + NOISE[:400])),
        "EXIF with a wrong length": _in_jpeg(b"\xff\xe1\xf0\0" + _nested(exif([UPRIGHT]))),
        "EXIF with a short length": _in_jpeg(b"\xff\xe1\0\x0c" + _nested(exif([UPRIGHT] * 40))),
        "70 comments": _in_jpeg(*[segment(0xFE, NOISE)] * 70),
        "several pictures that are not there": _in_jpeg(segment(0xE2, b"MPF\0" + exif([(0xB001, 4, 1, b"\2\0\0\0")]))),
        "resources of Photoshop, cut": _in_jpeg(segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\xff\xff\0")),
        "FlashPix, JFXX": _in_jpeg(segment(0xE2, b"FPXR\0"), segment(0xE0, b"JFXX\0\x10"), segment(0xE0, b"JFIF")),
        "Adobe, cut": _in_jpeg(segment(0xEE, b"Adobe\0")),
        "XMP": _in_jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta " + NOISE)),
    },
    "PNG": {
        **{f"EXIF: {name}": _in_png(chunk(b"eXIf", block)) for name, block in EXIF.items()},
        **{
            f"profile: {name}": _in_png(chunk(b"iCCP", b"x\0\0" + zlib.compress(profile)))
            for name, profile in PROFILES.items()
        },
        "profile: not packed": _in_png(chunk(b"iCCP", b"x\0\0" + NOISE)),
        "profile: of 40 MB": _in_png(chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(40_000_000)))),
        "profile: no name": _in_png(chunk(b"iCCP", b"")),
        "text of 2 MB, packed": _in_png(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2_000_000)))),
        "text of 2 MB, packed, at the end": _at_end_of_png(
            chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"{" * 2_000_000))
        ),
        "70 texts of 1 MB": _in_png(*[chunk(b"tEXt", b"workflow\0" + bytes(1_000_000))] * 70),
        "text with a wrong checksum": _in_png(chunk(b"tEXt", b"a\0b", wrong=True)),
        "text that is no text": _in_png(chunk(b"iTXt", b"\xff\xfe"), chunk(b"zTXt", b""), chunk(b"tEXt", b"")),
        "text with a wrong length": _in_png(b"\0\0\x40\0" + chunk(b"tEXt", b"a\0b")[4:]),
        "size and time, cut": _in_png(
            chunk(b"pHYs", b"\0"), chunk(b"tIME", b"\0"), chunk(b"gAMA", b""), chunk(b"cHRM", b"1")
        ),
        "frames that are not there": _in_png(chunk(b"acTL", b"\0\0")),
        "digits of EXIF": _in_png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nxyz")),
    },
    "WEBP": {
        **{f"EXIF: {name}": _in_webp((b"EXIF", block)) for name, block in EXIF.items()},
        **{f"profile: {name}": _in_webp((b"ICCP", profile)) for name, profile in PROFILES.items()},
        "XMP": _in_webp((b"XMP ", NOISE)),
        "unknown": _in_webp((b"abcd", NOISE), (b"EXIF", b"\0")),
    },
    "TIFF": {
        "resolution as text": _in_tiff((0x11A, 2, 9, b"abcd"), (0x11B, 12, 9, b"\xff" * 4), (0x128, 2, 1, b"\xff" * 4)),
        "orientation as text": _in_tiff((0x112, 2, 4, b"top\0")),
        "orientation as fractions": _in_tiff((0x112, 5, 70_000, b"\xff" * 4)),
        "EXIF outside": _in_tiff((0x8769, 4, 1, b"\xff" * 4), (0x8825, 2, 3, b"\xff" * 4)),
        "EXIF to itself": _in_tiff((0x8769, 4, 1, b"\x08\0\0\0"), (0x14A, 4, 9, b"\x08\0\0\0")),
        "profile: outside": _in_tiff((0x8773, 7, 3000, b"\xff" * 4)),
        "profile: as numbers": _in_tiff((0x8773, 12, 2**32 - 1, b"\x08\0\0\0")),
        "XMP as fractions": _in_tiff((0x2BC, 5, 2**31, b"\x08\0\0\0")),
        "maker": _in_tiff(
            (0x10F, 9, 2**32 - 1, b"\xff" * 4), (0x131, 250, 7, b"\xff" * 4), (0x8649, 7, 9, b"\xff" * 4)
        ),
    },
}


def damages(data: bytes) -> Mapping[str, Callable[[bytes], bytes]]:
    """The damages of a file's format, by name."""
    return DAMAGES[SIGNATURES[data[:2]]]


def copy_damaged(folder: Path, target: Path, *, first: int = 0) -> dict[str, str]:
    """Copy a folder's files, each image with another damage, from number `first` on. Returns the damage of each."""
    target.mkdir(parents=True, exist_ok=True)
    done = {}
    for index, path in enumerate(sorted(folder.iterdir()), first):
        data = path.read_bytes()
        if data[:2] in SIGNATURES:
            kinds = damages(data)
            name = [*kinds][index % len(kinds)]
            data, done[path.name] = kinds[name](data), name
        (target / path.name).write_bytes(data)
    return done


if __name__ == "__main__":
    for name, damage in copy_damaged(*map(Path, sys.argv[1:3])).items():
        print(f"{name}: {damage}")
