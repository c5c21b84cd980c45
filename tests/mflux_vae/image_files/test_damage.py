"""Damaged metadata of a sound image never cost its pixels."""

from __future__ import annotations

import io
import logging
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mflux_vae.errors import ImageError
from mflux_vae.image_files.notes import CONVERTED, ImageNotes
from mflux_vae.images import image_text, load_image, load_images
from tests.helpers.damage_metadata import DAMAGES, UPRIGHT, chunk, exif, segment

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DRAWN = 250
"""Examples of a property in a quick run; slow ones draw 3,000 in all."""


QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def picture(height: int = 12, width: int = 20) -> Image.Image:
    """Without symmetry, so that every turn shows."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([rows * 20 % 256, columns * 12 % 256, (rows + columns) * 7 % 256], axis=-1).astype(np.uint8)
    )


def encoded(format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture().save(stream, format, **({"lossless": True} if format == "WEBP" else {}), **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage") / "image"


@pytest.mark.parametrize(("format", "kind"), [(format, kind) for format in FORMATS for kind in DAMAGES[format]])
def test_pixels_of_a_damaged_copy_are_those_of_the_original(path, format, kind):
    data = encoded(format)
    path.write_bytes(data)
    sound = load_image(path)
    path.write_bytes(DAMAGES[format][kind](data))
    notes = ImageNotes()
    np.testing.assert_array_equal(load_image(path, notes=notes), sound)
    assert len(notes.warnings) == ("profile" in kind) and not notes.lines(logging.INFO)
    assert isinstance(image_text(path), dict)


@pytest.mark.parametrize(
    ("format", "kind"), [(format, kind) for format in FORMATS for kind in DAMAGES[format] if "text" not in kind]
)
def test_images_that_pillow_opened(path, format, kind):
    path.write_bytes(encoded(format))
    sound = load_image(path)
    path.write_bytes(DAMAGES[format][kind](encoded(format)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(path)
        except Exception:
            pytest.skip("Pillow does not open it")
    with image:
        np.testing.assert_array_equal(load_images(image)[0], sound)


EXIF = exif(
    [
        (0x10F, 2, 6, struct.pack("<I", 110)),
        (0x112, 3, 1, struct.pack("<HH", 6, 0)),
        (0x11A, 5, 1, struct.pack("<I", 116)),
    ]
    + [(0x8769, 4, 1, struct.pack("<I", 62)), UPRIGHT],
    rest=exif([(0x9286, 7, 8, struct.pack("<I", 124)), (0xA001, 3, 1, struct.pack("<HH", 1, 0))])[8:] + bytes(40),
    following=62,
)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6" dc:title="a"/></x:xmpmeta>'


def stored(format: str, kind: str, body: bytes) -> tuple[bytes, int, int]:
    """An image with metadata: the file, and where what describes them (but not their type) begins and ends."""
    data = encoded(format)
    if format == "JPEG":
        head = {"EXIF": b"Exif\0\0", "profile": b"ICC_PROFILE\0\1\1", "text": b"http://ns.adobe.com/xap/1.0/\0"}[kind]
        piece = segment(0xE2 if kind == "profile" else 0xE1, head + body)
        return data[:2] + piece + data[2:], 4, 2 + len(piece)
    if format == "PNG":
        name, head = {
            "EXIF": (b"eXIf", b""),
            "profile": (b"iCCP", b"a\0\0"),
            "text": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0"),
        }[kind]
        piece = chunk(name, head + (zlib.compress(body) if kind == "profile" else body))
        return data[:33] + piece + data[33:], 33, 33 + len(piece)
    if format == "WEBP":
        name = {"EXIF": b"EXIF", "profile": b"ICCP", "text": b"XMP "}[kind]
        extent = struct.pack("<I", 19)[:3] + struct.pack("<I", 11)[:3]
        front = b"VP8X" + struct.pack("<I", 10) + b"\x3c\0\0\0" + extent
        piece = name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
        inner = front + (piece + data[12:] if kind == "profile" else data[12:] + piece)
        start = 12 + inner.index(piece)
        return b"RIFF" + struct.pack("<I", 4 + len(inner)) + b"WEBP" + inner, start + 4, start + len(piece)
    tag = {
        "EXIF": (274, 3, 1, struct.pack("<HH", 6, 0)),
        "profile": (34675, 7, len(body), b""),
        "text": (700, 1, len(body), b""),
    }[kind]
    start = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[start : start + 2])[0]
    rows = data[start + 2 : start + 2 + 12 * count]
    place = len(data) + 2 + 12 * count
    value = tag[3] or struct.pack("<I", place + 16)
    entry = struct.pack("<HHI", *tag[:3]) + value
    directory = struct.pack("<H", count + 1) + rows + entry + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory + body, place + 2, place + 12


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """An image whose metadata are cut, changed or replaced, correctly wrapped; or with changes of the wrapping, too."""
    format, kind = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(("EXIF", "profile", "text")))
    body = bytearray({"EXIF": EXIF, "profile": SRGB, "text": XMP}[kind])
    change = draw(st.sampled_from(("bytes", "cut", "noise", "wrapping", "longer")))
    if change == "cut":
        del body[draw(st.integers(0, len(body))) :]
    elif change == "noise":
        body = bytearray(draw(st.binary(max_size=600)))
    elif change == "longer":
        body += draw(st.binary(min_size=1, max_size=40)) * draw(st.integers(1, 200))
    elif change == "bytes":
        for place, value in draw(
            st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), min_size=1, max_size=12)
        ):
            body[place] = value
    data, start, end = stored(format, kind, bytes(body))
    if change == "wrapping":
        wrapped = bytearray(data)
        for place, value in draw(
            st.lists(st.tuples(st.integers(start, end - 1), st.integers(0, 255)), min_size=1, max_size=6)
        ):
            wrapped[place] = value
        data = bytes(wrapped)
    return format, kind, data


TURNS = [
    lambda array: array,
    *[lambda array, turn=turn: np.asarray(Image.fromarray(array).transpose(turn)) for turn in Image.Transpose],
]
SOUND: dict[str, np.ndarray] = {}


def check(path: Path, format: str, kind: str, data: bytes) -> None:
    if format not in SOUND:
        path.write_bytes(encoded(format))
        SOUND[format] = load_image(path)
    path.write_bytes(data)
    notes = ImageNotes()
    pixels = load_image(path, notes=notes)
    image_text(path)
    sound = SOUND[format]
    if kind == "profile" and any(CONVERTED.text.format("") in line for line in notes.lines(CONVERTED.level)):
        assert pixels.shape == sound.shape  # a damaged profile can be that of another space
    else:
        assert any(pixels.shape == turn(sound).shape and (pixels == turn(sound)).all() for turn in TURNS)


@given(damaged())
@settings(max_examples=DRAWN, derandomize=True, **QUIET)
def test_any_damage_gives_the_pixels(path, drawn):
    check(path, *drawn)


@pytest.mark.slow
@given(damaged())
@settings(max_examples=3000, **QUIET)
def test_any_damage_gives_the_pixels_3000_times(path, drawn):
    check(path, *drawn)


def test_sound_metadata_are_used(path):
    for format in FORMATS:
        for kind, body in (("EXIF", EXIF), ("text", XMP)):
            path.write_bytes(encoded(format))
            sound = load_image(path)
            path.write_bytes(stored(format, kind, body)[0])
            np.testing.assert_array_equal(load_image(path), np.rot90(sound, -1), err_msg=f"{format} {kind}")


@pytest.mark.parametrize("format", FORMATS)
def test_broken_pixels_are_refused(path, format):
    data = next(iter(DAMAGES[format].values()))(encoded(format))
    path.write_bytes(data[: len(data) // 3] if format != "TIFF" else data[:60])
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(path)


def test_memory_is_bounded(path):
    """A text of 100 MB in 100 KB, and a profile of the same kind."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(100)) + packer.flush()
    data = encoded("PNG")
    path.write_bytes(
        data[:33] + chunk(b"zTXt", b"workflow\0\0" + packed) + chunk(b"iCCP", b"a\0\0" + packed) + data[33:]
    )
    tracemalloc.start()
    load_image(path)
    image_text(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


def test_hostile_lengths_end_soon(path):
    """Files of many places that look like the next part, none of which is."""
    jpeg, png, webp = encoded("JPEG"), encoded("PNG"), encoded("WEBP")
    path.write_bytes(jpeg[:2] + b"\xff\xe1\xff\xff" + b"\xff\xe0\0\2" * 100_000)
    with pytest.raises(ImageError):
        load_image(path)
    path.write_bytes(png[:33] + b"\xff" * 8 + b"\0\x10\0\0IDAT" * 100_000)
    with pytest.raises(ImageError):
        load_image(path)
    path.write_bytes(webp[:12] + b"VP8X\x0a\0\0\0" + bytes(10) + b"\1\2\3\4" * 3 + b"ANMF\xff\xff\xff\x7f" * 100_000)
    with pytest.raises(ImageError):
        load_image(path)
