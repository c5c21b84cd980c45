"""The format of an image file, recognised by its first bytes. The file name matters for camera raws only."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

READ = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
"""Formats that Pillow always reads."""

HEIF = ("HEIC", "AVIF")
"""Formats that need the extra `heif`."""

RAW = "camera raw"

HEAD = 256
"""Bytes that tell the format."""

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0\x10\0\0\0CR", RAW),
    (b"IIRO", RAW),
    (b"IIRS", RAW),
    (b"MMOR", RAW),
    (b"IIU\0", RAW),
    (b"FUJIFILMCCD-RAW", RAW),
    (b"FOVb", RAW),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"8BPS", "PSD"),
)

_RAW_SUFFIXES = frozenset(
    f".{name}"
    for name in "3fr arw cr2 crw dcr dng erf fff iiq k25 kdc mef mos nef nrw orf pef raf raw rw2 sr2 srf srw".split()
)
"""Extensions of raw files, most of which have the signature of a TIFF file."""

_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})

_BMP_HEADERS = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
"""Sizes of the header that follows the file header of a BMP file."""


def image_format(path: str | Path) -> str | None:
    """The format of an image file by its first bytes, such as "JPEG"; None if it is not an image.

    Raises:
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        return format_of(file.read(HEAD), path)


def format_of(head: bytes, path: str | Path) -> str | None:
    """The same, from the first `HEAD` bytes of the file."""
    found = _by_content(head)
    return RAW if found == "TIFF" and Path(path).suffix.lower() in _RAW_SUFFIXES else found


def readable(format: str | None) -> bool:
    """Whether images of this format are read: `READ` always, `HEIF` with the extra `heif`."""
    return format in READ or (format in HEIF and find_spec("pillow_heif") is not None)


def remedy(format: str | None) -> str:
    """What to do about a file that is not read."""
    if format in HEIF:
        return "pip install 'mflux-vae[heif]', or convert it to JPEG (on macOS: sips -s format jpeg)"
    return "convert it to JPEG or PNG"


def _by_content(head: bytes) -> str | None:
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4], "big"), len(head))
        major, *others = (head[start : start + 4] for start in (8, *range(16, end, 4)))
        return _by_brands(major, others)
    return None


def _by_brands(major: bytes, others: list[bytes]) -> str | None:
    """Format of a file of boxes ("ftyp"), as in HEIF; `mif1` and `msf1` leave the coding open."""
    if major == b"crx ":
        return RAW
    if major in _AVIF_BRANDS or (major in (b"mif1", b"msf1") and _AVIF_BRANDS & {*others}):
        return "AVIF"
    return "HEIC" if major in _HEIC_BRANDS else None
