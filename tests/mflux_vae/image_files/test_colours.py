"""Colour profiles: converted to sRGB as Pillow's ImageCms does, sRGB unchanged to the bit."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mflux_vae.image_files import profiles
from mflux_vae.image_files.colour import read_profile
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.images import load_image, load_images
from tests.helpers.damage_metadata import chunk, exif

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PRO_PHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))
PROFILES = {
    "Display P3": profiles.matrix_profile("Display P3", profiles.DISPLAY_P3, profiles.SRGB_CURVE),
    "Adobe RGB": profiles.adobe_rgb(),
    "ProPhoto": profiles.matrix_profile("ProPhoto RGB", PRO_PHOTO, (1.8,), white=(0.3457, 0.3585)),
    "linear": profiles.matrix_profile("linear", profiles.SRGB, (1.0,)),
}


def photo(side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def save(path: Path, image: Image.Image, format: str, **options: object) -> np.ndarray:
    """Write a file; returns its pixels as Pillow reads them."""
    image.save(path, format, **({"lossless": True} if format == "WEBP" else {}), **options)
    with Image.open(path) as opened:
        return np.asarray(opened.copy())


def reference(pixels: np.ndarray, profile: bytes, mode: str = "RGB") -> np.ndarray:
    target = ImageCms.createProfile("sRGB")
    image = Image.fromarray(pixels, mode) if mode == "CMYK" else Image.fromarray(pixels)
    return np.asarray(ImageCms.profileToProfile(image, io.BytesIO(profile), target, outputMode="RGB"))


def grey_profile(curve: bytes) -> bytes:
    """An ICC 2 profile of grey with a curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    tags, body, start = b"", b"", 128 + 4 + 12 * 2
    for name, data in ((b"wtpt", white), (b"kTRC", curve + bytes(-len(curve) % 4))):
        tags += struct.pack(">4sII", name, start + len(body), len(data))
        body += data
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    head += struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", 2) + tags + body


LINEAR_GREY = grey_profile(struct.pack(">4s4xI", b"curv", 0))
GAMMA_GREY = grey_profile(struct.pack(">4s4xIH", b"curv", 1, int(1.8 * 256)))


def srgb_of_linear(levels: np.ndarray) -> np.ndarray:
    light = levels.astype(np.float64)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", PROFILES)
def test_conversion(tmp_path, name, format):
    pixels = save(tmp_path / "a", photo(), format, icc_profile=PROFILES[name])
    notes = ImageNotes()
    converted = load_image(tmp_path / "a", notes=notes)
    np.testing.assert_allclose(converted.astype(int), reference(pixels, PROFILES[name]), atol=1)
    assert np.abs(converted.astype(int) - pixels).max() > 20
    (line,) = notes.lines(logging.INFO)
    assert name in line and not notes.warnings
    with Image.open(tmp_path / "a") as opened:
        np.testing.assert_array_equal(load_images(opened, notes=notes)[0], converted)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "profile", [None, SRGB, profiles.matrix_profile("sRGB by another", profiles.SRGB, profiles.SRGB_CURVE)]
)
def test_srgb_is_unchanged_to_the_bit(tmp_path, profile, format, caplog):
    pixels = save(tmp_path / "a", photo(), format, **({"icc_profile": profile} if profile else {}))
    with caplog.at_level("INFO"):
        np.testing.assert_array_equal(load_image(tmp_path / "a"), pixels)
    assert not caplog.records


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_grey(tmp_path, format):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    pixels = save(tmp_path / "linear", ramp, format, icc_profile=LINEAR_GREY)
    expected = srgb_of_linear(pixels / 255)[..., None].repeat(3, axis=-1)
    np.testing.assert_allclose(load_image(tmp_path / "linear", notes=ImageNotes()), expected, atol=1)
    pixels = save(tmp_path / "gamma", ramp, format, icc_profile=GAMMA_GREY)
    converted = load_image(tmp_path / "gamma", notes=ImageNotes())
    np.testing.assert_allclose(converted[1:].astype(int), reference(pixels, GAMMA_GREY)[1:], atol=1)
    # grey pixels with a profile of colours
    pixels = save(tmp_path / "colours", ramp, format, icc_profile=PROFILES["linear"])
    expected = srgb_of_linear(pixels / 255)[..., None].repeat(3, axis=-1)
    np.testing.assert_allclose(load_image(tmp_path / "colours", notes=ImageNotes()), expected, atol=1)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_shadows(tmp_path, format):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    levels[0] = np.arange(0, 512, 32)
    save(tmp_path / "a", Image.fromarray(levels), format, icc_profile=LINEAR_GREY)
    converted = load_image(tmp_path / "a", notes=ImageNotes())[..., 0]
    np.testing.assert_allclose(converted, srgb_of_linear(levels / 65535), atol=1)
    assert len(np.unique(converted[0])) > 8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_opacity_is_kept_apart(tmp_path, mode):
    rgba = np.dstack([np.asarray(photo()), np.full((16, 16), 255, np.uint8)])
    rgba[:8, :, 3] = 0
    image = Image.fromarray(rgba) if mode != "P" else photo().quantize(32)
    image = image.convert(mode) if mode == "LA" else image
    image.save(tmp_path / "a.png", icc_profile=PROFILES["Adobe RGB"])
    converted = load_image(tmp_path / "a.png", notes=ImageNotes())
    expected = reference(np.asarray(image.convert("RGB")), PROFILES["Adobe RGB"])
    if mode != "P":
        assert (converted[:8] == 255).all()
    np.testing.assert_allclose(converted[8:].astype(int), expected[8:], atol=1)


def test_inks_with_and_without_a_profile(tmp_path):
    inks = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8), "CMYK")
    inks.save(tmp_path / "a.tif")
    notes = ImageNotes()
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif", notes=notes), np.asarray(inks.convert("RGB")))
    assert "CMYK" in notes.warnings[0]
    inks.save(tmp_path / "a.tif", icc_profile=SRGB)  # of another kind of colours
    notes = ImageNotes()
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif", notes=notes), np.asarray(inks.convert("RGB")))
    assert "CMYK" in notes.warnings[0]


def test_a_profile_of_other_colours_or_of_nonsense_is_ignored(tmp_path):
    swapped = bytearray(PROFILES["Display P3"])
    place = swapped.index(b"gTRC", 132)
    start = struct.unpack(">I", swapped[place + 4 : place + 8])[0]
    swapped[start : start + 40] = struct.pack(">4s4xHHi", b"para", 0, 0, 6 << 16).ljust(40, b"\0")
    for profile in (LINEAR_GREY, bytes(swapped), SRGB[:200], b"", b"x" * 500):
        pixels = save(tmp_path / "a", photo(), "TIFF", icc_profile=profile or b"\0")
        notes = ImageNotes()
        np.testing.assert_array_equal(load_image(tmp_path / "a", notes=notes), pixels)
        assert len(notes.warnings) == 1 and len(notes.warnings[0]) < 300


PLAIN = [31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ({b"gAMA": struct.pack(">I", 45455), b"cHRM": struct.pack(">8I", *PLAIN)}, None),
        ({b"gAMA": struct.pack(">I", 100000)}, "linear"),
        ({b"gAMA": struct.pack(">I", 100000), b"sRGB": b"\0"}, None),
        ({b"cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)}, "Display P3"),
        ({b"cICP": b"\x0c\x0d\0\1"}, "Display P3"),
        ({b"cICP": b"\x01\x0d\0\1"}, None),
        ({b"cICP": b"\x0c\x10\0\1"}, None),
        ({b"gAMA": struct.pack(">I", 1)}, None),
        ({b"cHRM": bytes(32)}, None),
        ({b"iCCP": b"a\0\0" + zlib.compress(PROFILES["linear"]), b"gAMA": struct.pack(">I", 45455)}, "linear"),
        ({b"cICP": b"\x0c\x0d\0\1", b"iCCP": b"a\0\0" + zlib.compress(PROFILES["linear"])}, "Display P3"),
    ],
)
def test_colour_spaces_that_png_states_without_a_profile(tmp_path, chunks, expected):
    pixels = save(tmp_path / "a.png", photo(), "PNG")
    data = (tmp_path / "a.png").read_bytes()
    for wrong in (False, True):
        added = b"".join(chunk(kind, body, wrong=wrong and kind != b"iCCP") for kind, body in chunks.items())
        (tmp_path / "a.png").write_bytes(data[:33] + added + data[33:])
        if wrong and b"iCCP" in chunks:
            continue
        converted = load_image(tmp_path / "a.png", notes=ImageNotes())
        if expected is None or wrong:
            np.testing.assert_array_equal(converted, pixels)
        else:
            np.testing.assert_allclose(converted.astype(int), reference(pixels, PROFILES[expected]), atol=2)


def test_adobe_rgb_of_cameras(tmp_path):
    block = exif([(0x8769, 4, 1, struct.pack("<I", 26))], rest=exif([(0xA001, 3, 1, struct.pack("<HH", 2, 0))])[8:])
    pixels = save(tmp_path / "a.jpg", photo(), "JPEG", exif=b"Exif\0\0" + block)
    converted = load_image(tmp_path / "a.jpg", notes=ImageNotes())
    np.testing.assert_allclose(converted.astype(int), reference(pixels, PROFILES["Adobe RGB"]), atol=1)
    pixels = save(tmp_path / "a.jpg", photo(), "JPEG", exif=b"Exif\0\0" + block, icc_profile=SRGB)
    np.testing.assert_array_equal(load_image(tmp_path / "a.jpg", notes=ImageNotes()), pixels)


def test_large_profiles_in_several_segments(tmp_path):
    profile = PROFILES["Display P3"] + bytes(150_000)
    pixels = save(tmp_path / "a.jpg", photo(), "JPEG", icc_profile=profile)
    converted = load_image(tmp_path / "a.jpg", notes=ImageNotes())
    np.testing.assert_allclose(converted.astype(int), reference(pixels, PROFILES["Display P3"]), atol=1)


def test_lab(tmp_path):
    lab = ImageCms.profileToProfile(
        photo(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(tmp_path / "a.tif")
    difference = load_image(tmp_path / "a.tif", notes=ImageNotes()).astype(int) - np.asarray(photo())
    assert np.abs(difference).mean() < 3


def test_names_of_profiles_are_shown_in_one_line():
    profile = profiles.matrix_profile("a\nlong name " * 30, profiles.DISPLAY_P3, profiles.SRGB_CURVE)
    name = read_profile(profile).name
    assert len(name) <= 40 and "\n" not in name
