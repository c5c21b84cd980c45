"""Files of every kind: what is read, what is noted, what is refused and how."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import struct
import threading
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from mflux_vae.errors import ImageError
from mflux_vae.image_files import notes as kinds
from mflux_vae.image_files import profiles
from mflux_vae.image_files.notes import FRAMES, ImageNotes
from mflux_vae.images import content_hash, image_text, load_image, load_images, save_image
from tests.helpers.damage_metadata import chunk
from tests.mflux_vae.odd_images import deep_png

P3 = profiles.matrix_profile("Display P3", profiles.DISPLAY_P3, profiles.SRGB_CURVE)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
AVIF = b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf" + bytes(200)


def photo(seed: int = 0, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.png", "a", "a.heic", "a.txt"])
def test_the_name_does_not_matter(tmp_path, name):
    photo().save(tmp_path / "a.jpg", quality=95)
    expected = load_image(tmp_path / "a.jpg")
    os.rename(tmp_path / "a.jpg", tmp_path / name)
    np.testing.assert_array_equal(load_image(tmp_path / name), expected)


@pytest.mark.parametrize(("data", "format"), [(HEIC, "HEIC"), (AVIF, "AVIF"), (b"\xff\x0a" + bytes(99), "JPEG XL")])
@pytest.mark.parametrize("name", ["fake.png", "real.heic"])
def test_formats_that_are_not_read_are_named_with_a_remedy(tmp_path, monkeypatch, data, format, name):
    monkeypatch.setattr("mflux_vae.image_files.formats.find_spec", lambda name: None)
    (tmp_path / name).write_bytes(data)
    for read in (load_image, image_text, lambda path: load_images([path])):
        with pytest.raises(ImageError, match=format) as error:
            read(tmp_path / name)
        assert ("heif" in str(error.value)) == (format != "JPEG XL") and "JPEG" in str(error.value)


def test_raw_files_are_not_read_as_their_thumbnails(tmp_path):
    photo().save(tmp_path / "a.tif")
    os.rename(tmp_path / "a.tif", tmp_path / "a.nef")
    with pytest.raises(ImageError, match="camera raw"):
        load_image(tmp_path / "a.nef")


def test_pipes_are_read(tmp_path):
    photo().save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    content = (tmp_path / "a.png").read_bytes()
    thread = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    thread.start()
    np.testing.assert_array_equal(load_image(tmp_path / "pipe"), np.asarray(photo()))
    thread.join()


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="not exist"):
        load_images(tmp_path / "none.png")


@pytest.mark.parametrize("sources", [None, 5, b"abc", 1.5])
def test_sources_that_are_none(sources):
    with pytest.raises(ImageError, match="image 0"):
        load_images(sources)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".tiff", ".png"])
def test_further_frames_are_noted(tmp_path, suffix, caplog):
    frames = [photo(seed) for seed in range(3)]
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **options)
    frames[0].save(tmp_path / "one.png")
    with caplog.at_level("INFO"):
        picture = load_image(tmp_path / f"a{suffix}")
    assert FRAMES.text in caplog.text and caplog.records[0].levelname == "WARNING"
    assert suffix == ".gif" or (picture == np.asarray(frames[0])).all()


def test_previews_are_no_further_frames(tmp_path, caplog):
    photo().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[photo(1)])
    photo().save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    start = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[start : start + 2])[0]
    end = start + 2 + 12 * count
    smaller = struct.pack("<HHHII", count + 1, 254, 4, 1, 1) + data[start + 2 : end] + bytes(4)
    (tmp_path / "a.tif").write_bytes(data[:end] + struct.pack("<I", len(data)) + data[end + 4 :] + smaller)
    with caplog.at_level("INFO"):
        load_images([tmp_path / "a.jpg", tmp_path / "a.tif"])
    assert not caplog.records


def test_a_call_logs_one_line_a_kind(tmp_path, caplog):
    for index in range(12):
        photo().save(tmp_path / f"{index:02d}.gif", save_all=True, append_images=[photo(1)])
    with caplog.at_level("INFO"):
        load_images(sorted(tmp_path.iterdir()))
    (record,) = caplog.records
    assert "00.gif" in record.getMessage() and "9 more" in record.getMessage()


def test_first_images_are_named_once(caplog):
    notes = ImageNotes()
    with caplog.at_level("INFO"):
        for index in range(5):
            notes.add(FRAMES, f"{index}.gif")
            notes.log_first(logging.getLogger("mflux_vae"))
    assert len(caplog.records) == 1 and "0.gif" in caplog.text


def test_warnings_of_pillow_name_the_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    photo().save(tmp_path / "large.png")
    load_image(tmp_path / "large.png")
    (record,) = caplog.records
    assert "large.png" in record.getMessage() and record.levelname == "WARNING" and "256 pixels" in record.getMessage()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"large\.png .*pixels"):
        load_image(tmp_path / "large.png")


def test_filters_of_warnings_stay_as_they_were(tmp_path):
    photo().save(tmp_path / "a.png")
    before = [*warnings.filters]
    threads = [threading.Thread(target=load_image, args=(tmp_path / "a.png",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*warnings.filters] == before


def test_opacity_of_palettes_is_no_warning(tmp_path, caplog):
    image = photo().quantize(8)
    image.save(tmp_path / "a.png", transparency=bytes(range(0, 256, 32)))
    picture = load_image(tmp_path / "a.png", notes=ImageNotes())
    with Image.open(tmp_path / "a.png") as opened:
        rgba = opened.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    np.testing.assert_array_equal(picture, np.asarray(expected))
    assert not caplog.records


def with_opacity(data: bytes, body: bytes, **options: bool) -> bytes:
    return data[:33] + chunk(b"tRNS", body, **options) + data[33:]


def test_one_transparent_level(tmp_path):
    levels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    for depth, stored in ((8, levels), (4, levels), (2, levels % 4), (1, levels % 2), (16, levels)):
        scale = 255 // (2**depth - 1) if depth < 8 else 1
        if depth == 16:
            grey = stored.astype(np.uint16) * 4112
            data, level, shown = deep_png(grey[..., None], 0), 3 * 4112, stored * 16
        else:
            stream = io.BytesIO()
            if depth == 8:
                Image.fromarray(stored).save(stream, "PNG")
            else:
                stream.write(packed_png(stored, depth))
            data, level, shown = stream.getvalue(), 1 if depth < 8 else 3, stored * scale
        (tmp_path / "a.png").write_bytes(with_opacity(data, struct.pack(">H", level)))
        transparent = stored == (1 if depth < 8 else 3)
        picture = load_image(tmp_path / "a.png", notes=ImageNotes())[..., 0]
        np.testing.assert_array_equal(picture, np.where(transparent, 255, shown), err_msg=f"{depth} bits")


def packed_png(levels: np.ndarray, depth: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits."""
    import zlib

    bits = np.unpackbits(levels[..., None], axis=-1)[..., -depth:].reshape(len(levels), -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    head = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("body", [b"", b"\0", b"\0\1\0", bytes(300)])
def test_opacity_that_does_not_fit_costs_no_pixels(tmp_path, body):
    for image in (photo(), photo().convert("L"), photo().quantize(8)):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        place = stream.getvalue().index(b"IDAT") - 4
        data = stream.getvalue()
        (tmp_path / "a.png").write_bytes(data[:place] + chunk(b"tRNS", body, wrong=True) + data[place:])
        assert load_image(tmp_path / "a.png", notes=ImageNotes()).shape == (16, 16, 3)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I"]
)
def test_pillow_images_of_every_mode(mode):
    white = Image.new("RGB", (4, 4), "white")
    image = {
        "La": lambda: white.convert("LA").convert("La"),
        "RGBa": lambda: white.convert("RGBA").convert("RGBa"),
        "PA": lambda: white.convert("RGBA").convert("PA"),
        "I": lambda: Image.new("I", (4, 4), 65535),
    }.get(mode, lambda: white.convert(mode))()
    (picture,) = load_images(image, notes=ImageNotes())
    assert picture.shape == (4, 4, 3) and picture.min() >= 253


def test_texts(tmp_path):
    save_image(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8), text={"mflux-vae": "é", "b": "c"})
    assert image_text(tmp_path / "a.png") == {"mflux-vae": "é", "b": "c"}
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + chunk(b"tEXt", b"large\0" + bytes(2_000_000)) + data[33:])
    assert image_text(tmp_path / "a.png") == {"mflux-vae": "é", "b": "c"}
    photo().save(tmp_path / "a.jpg", comment=b"c")
    assert image_text(tmp_path / "a.jpg") == {}


def test_lines_are_of_readable_length():
    notes = ImageNotes()
    for index in range(30):
        notes.add(kinds.BROKEN_PROFILE, f"{index:02d}\n" + "name" * 60, "detail\n" * 90 + str(index))
        notes.add(kinds.FRAMES, f"{index:02d}" + "é\u202e" * 100)
    notes.add(kinds.INKS, "folder/" * 90 + "a.png")
    lines = notes.warnings
    assert len(lines) == 3 and all(len(line) < 300 and line.isprintable() for line in lines)
    assert "27 more" in lines[0]


@pytest.mark.parametrize(("least", "most"), [(0, 65535), (-5, 9), (0, 70000)])
def test_clipped_values_are_noted(tmp_path, least, most):
    Image.fromarray(np.array([[least, most]], np.int32)).save(tmp_path / "a.tif")
    notes = ImageNotes()
    load_image(tmp_path / "a.tif", notes=notes)
    assert (len(notes.warnings) == 1) == ((least, most) != (0, 65535))


def test_an_empty_profile_is_none():
    image = photo()
    image.info["icc_profile"] = b""
    notes = ImageNotes()
    np.testing.assert_array_equal(load_images(image, notes=notes)[0], np.asarray(photo()))
    assert not notes.warnings


@pytest.mark.parametrize("suffix", [".heic", ".avif"])
def test_heif_with_the_extra(tmp_path, suffix):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    rows, columns = np.mgrid[:48, :64]
    picture = np.stack([rows * 5, columns * 3, rows + columns], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / f"plain{suffix}", quality=95)
    Image.fromarray(picture).save(tmp_path / f"wide{suffix}", quality=95, icc_profile=P3)
    os.rename(tmp_path / f"plain{suffix}", tmp_path / "plain.png")
    assert np.abs(load_image(tmp_path / "plain.png").astype(int) - picture).mean() < 3
    notes = ImageNotes()
    load_image(tmp_path / f"wide{suffix}", notes=notes)
    assert "Display P3" in notes.lines(logging.INFO)[0]
    (tmp_path / "cut").write_bytes((tmp_path / "plain.png").read_bytes()[:300])
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path / "cut")


@pytest.mark.parametrize("source", [np.zeros((4, 4, 3), np.uint8), photo(), None, 3, b"a.png", ["a.png"]])
def test_what_is_not_a_file_name(source):
    for read in (load_image, image_text):
        with pytest.raises(ImageError, match="load_images") as error:
            read(source)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_hash_of_contents_depends_on_pixels_orientation_and_colours_alone(tmp_path, format):
    picture = Image.effect_noise((32, 24), 90).convert("RGB")

    def hashed(**options) -> str:
        path = tmp_path / "a"
        picture.save(path, format=format, **options)
        return content_hash(path)

    exif, other, turned = Image.Exif(), Image.Exif(), Image.Exif()
    exif[0x10F], other[0x10F], turned[0x112] = "a camera", "another camera", 6
    plain = hashed()
    assert plain == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest() or format == "WEBP"
    assert hashed(exif=exif) == hashed(exif=other)
    assert plain == hashed(exif=exif) or format == "WEBP"  # whose header says what follows
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert len({plain, hashed(exif=turned), hashed(icc_profile=profile)}) == 3
    picture = picture.rotate(180)
    assert hashed() != plain


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
