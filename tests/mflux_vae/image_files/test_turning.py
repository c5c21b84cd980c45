"""Every orientation in every format, mode and compression."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mflux_vae.image_files.exif import is_adobe_rgb, orientation
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.images import load_image, load_images
from tests.helpers.damage_metadata import chunk, exif

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}

MODES = ("1", "L", "P", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "I;16")
STORED = [
    *((mode, compression) for mode in MODES for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")),
    *((mode, "jpeg") for mode in ("L", "RGB", "CMYK", "YCbCr")),
    ("1", "group4"),
]
"""Modes and compressions of TIFF."""


def image(mode: str) -> Image.Image:
    rng = np.random.default_rng(0)
    if mode in ("I", "I;16"):
        return Image.fromarray(rng.integers(0, 65536, (6, 11), dtype=np.int32 if mode == "I" else np.uint16))
    if mode in ("1", "P"):
        grey = Image.fromarray(rng.integers(0, 256, (6, 11), dtype=np.uint8))
        return grey.convert("1") if mode == "1" else grey.convert("RGB").quantize(16)
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (11, 6), rng.integers(0, 256, 66 * bands, dtype=np.uint8).tobytes())


def read(path: Path) -> np.ndarray:
    return load_image(path, notes=ImageNotes())


@pytest.mark.parametrize(("mode", "compression"), STORED)
def test_tiff(tmp_path, mode, compression):
    path, options = tmp_path / "a.tif", {"compression": compression} if compression else {}
    image(mode).save(path, **options)
    upright = read(path)
    if mode == "RGB" and compression != "jpeg":
        np.testing.assert_array_equal(upright, np.asarray(image(mode)))
    for value, turn in TURNS.items():
        image(mode).save(path, tiffinfo={274: value}, **options)
        np.testing.assert_array_equal(read(path), turn(upright), err_msg=str(value))
        with Image.open(path) as opened:  # by name, not loaded
            np.testing.assert_array_equal(load_images(opened, notes=ImageNotes())[0], turn(upright), err_msg=str(value))
        with Image.open(path) as opened:
            opened.load()
            if compression is not None and mode != "YCbCr":  # which Pillow 10 turns wrong
                np.testing.assert_array_equal(load_images(opened, notes=ImageNotes())[0], turn(upright))


@pytest.mark.parametrize("options", [{"big_tiff": True}, {"strip_size": 33}, {"tiffinfo": {274: 6, 266: 1}}])
def test_other_layouts_of_tiff(tmp_path, options):
    path = tmp_path / "a.tif"
    exif_block = Image.Exif()
    exif_block[274] = 6
    image("RGB").save(path, exif=exif_block, **options)
    np.testing.assert_array_equal(read(path), np.rot90(np.asarray(image("RGB")), -1))


def test_big_endian_tiff_with_planes(tmp_path):
    pixels = np.asarray(image("RGB"))
    planes = pixels.transpose(2, 0, 1).tobytes()
    offsets = struct.pack(">III", *(8 + 66 * plane for plane in range(3)))
    tags = [
        (256, 3, 1, struct.pack(">HH", 11, 0)),
        (257, 3, 1, struct.pack(">HH", 6, 0)),
        (258, 3, 3, struct.pack(">I", 206 + 12)),
        (259, 3, 1, struct.pack(">HH", 1, 0)),
        (262, 3, 1, struct.pack(">HH", 2, 0)),
        (273, 4, 3, struct.pack(">I", 206)),
        (274, 3, 1, struct.pack(">HH", 6, 0)),
        (277, 3, 1, struct.pack(">HH", 3, 0)),
        (278, 3, 1, struct.pack(">HH", 6, 0)),
        (284, 3, 1, struct.pack(">HH", 2, 0)),
    ]
    rows = b"".join(struct.pack(">HHI", *tag[:3]) + tag[3] for tag in tags)
    directory = struct.pack(">H", len(tags)) + rows + bytes(4)
    data = b"MM\0*" + struct.pack(">I", 224) + planes + offsets + struct.pack(">HHH", 8, 8, 8) + directory
    (tmp_path / "a.tif").write_bytes(data)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), np.rot90(pixels, -1))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_other_formats(tmp_path, format, mode):
    path, options = tmp_path / "a", {"lossless": True} if format == "WEBP" else {}
    image(mode).save(path, format, **options)
    upright = read(path)
    for value, turn in TURNS.items():
        block = Image.Exif()
        block[274] = value
        image(mode).save(path, format, exif=block, **options)
        np.testing.assert_array_equal(read(path), turn(upright))
        with Image.open(path) as opened:
            np.testing.assert_array_equal(load_images(opened)[0], turn(upright))


def test_orientation_after_the_pixels_or_as_digits(tmp_path):
    stream = io.BytesIO()
    image("RGB").save(stream, "PNG")
    data, block = stream.getvalue(), exif([(0x112, 3, 1, struct.pack("<HH", 6, 0))])
    digits = b"Raw profile type exif\0\nexif\n" + b"%8d\n" % (len(block) + 6) + (b"Exif\0\0" + block).hex().encode()
    for extra in (chunk(b"eXIf", block), chunk(b"tEXt", digits), chunk(b"eXIf", b"Exif\0\0" + block)):
        (tmp_path / "a.png").write_bytes(data[:-12] + extra + data[-12:])
        np.testing.assert_array_equal(read(tmp_path / "a.png"), np.rot90(np.asarray(image("RGB")), -1))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "count", "code", "expected"),
    [(3, 1, "H", 6), (4, 1, "I", 6), (1, 1, "B", 6), (3, 2, "H", 1), (2, 1, "B", 1)],
)
def test_orientation_of_each_type(order, kind, count, code, expected):
    value = struct.pack(order + code, 6).ljust(4, b"\0")
    assert orientation(exif([(0x112, kind, count, value)], order=order)) == expected


def test_orientation_out_of_range_is_upright():
    for value in (0, 9, 65535):
        assert orientation(exif([(0x112, 3, 1, struct.pack("<HH", value, 0))])) == 1
    assert orientation(None) == orientation(b"") == orientation(b"II*\0") == 1


def test_colour_space_of_cameras():
    inner = exif([(0xA001, 3, 1, struct.pack("<HH", 65535, 0)), (0xA005, 4, 1, struct.pack("<I", 56))])[8:]
    names = exif([(1, 2, 4, b"R03\0")])[8:]
    assert is_adobe_rgb(exif([(0x8769, 4, 1, struct.pack("<I", 26))], rest=inner + names))
    assert not is_adobe_rgb(exif([(0x8769, 4, 1, struct.pack("<I", 26))], rest=inner + exif([(1, 2, 4, b"R98\0")])[8:]))
    assert not is_adobe_rgb(exif([(0x8769, 4, 1, b"\xff" * 4)])) and not is_adobe_rgb(None)
