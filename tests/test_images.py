from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mflux_vae import images
from mflux_vae.errors import ImageError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def test_only_pictures_are_found_sorted_and_the_rest_is_counted(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp", ".hidden.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    found, skipped = images.find_images(tmp_path)
    assert [path.name for path in found] == ["a.JPG", "b.png", "c.webp"]
    assert skipped == 4


def test_a_missing_folder_and_a_file_in_its_place_are_said(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        images.find_images(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageError, match="is a file"):
        images.find_images(tmp_path / "file")


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (0, 0, 10, 20))  # red at the left ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... and the camera was turned: red belongs at the top
    image.save(tmp_path / "turned.png", exif=exif)
    picture = images.load_image(tmp_path / "turned.png")
    assert picture.shape == (40, 20, 3)
    assert tuple(picture[2, 10]) == RED and tuple(picture[30, 10]) == WHITE


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 128, (128, 128, 128)),
        ("I;16", 128 * 257, (128, 128, 128)),
        ("I", 65535, WHITE),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("LA", (0, 0), WHITE),
        ("1", 1, WHITE),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, value, expected):
    name = "image.tiff" if mode == "I" else "image.png"
    Image.new(mode, (8, 8), value).save(tmp_path / name)
    assert tuple(images.load_image(tmp_path / name)[4, 4]) == expected


def test_a_palette_with_a_transparent_colour_lies_over_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "image.png", transparency=0)
    assert tuple(images.load_image(tmp_path / "image.png")[0, 0]) == WHITE


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "image.jpg")
    assert tuple(images.load_image(tmp_path / "image.jpg")[0, 0]) == WHITE


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (20, 20), (7, 90)])
def test_the_centre_square_is_kept(tmp_path, size):
    image = Image.new("RGB", size, WHITE)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste(RED, (left, top, left + side, top + side))
    image.save(tmp_path / "image.png")
    picture = images.load_image(tmp_path / "image.png", resolution=16)
    assert picture.shape == (16, 16, 3)
    assert tuple(picture[8, 8]) == RED


def test_resizing_keeps_the_mean_brightness(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images.save_image(tmp_path / "noise.png", noise)
    small = images.load_image(tmp_path / "noise.png", resolution=16)
    assert abs(small.mean() - noise.mean()) < 2


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n broken"])
def test_a_broken_picture_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.png"):
        images.load_image(tmp_path / "broken.png")


def test_a_picture_cut_short_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images.save_image(tmp_path / "whole.png", noise)
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"cut\.png"):
        images.load_image(tmp_path / "cut.png")


def test_pictures_without_a_range_are_refused(tmp_path):
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.tiff")
    with pytest.raises(ImageError, match="floating-point"):
        images.load_image(tmp_path / "float.tiff")


def test_pixels_and_pictures_are_inverse_and_clipped():
    levels = np.arange(256, dtype=np.uint8)
    assert (images.to_pictures(images.to_pixels(levels)) == levels).all()
    assert images.to_pixels(levels).min() == -1 and images.to_pixels(levels).max() == 1
    assert images.to_pictures(np.array([-7.0, 7.0, np.nan, np.inf])).tolist() == [0, 255, 0, 255]


def test_a_saved_picture_comes_back_with_its_text_and_leaves_no_other_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    images.save_image(tmp_path / "deep" / "image.png", noise, text={"prompt": "a photo of a café"})
    assert (images.load_image(tmp_path / "deep" / "image.png") == noise).all()
    assert images.image_text(tmp_path / "deep" / "image.png") == {"prompt": "a photo of a café"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["image.png"]


def test_rows_are_stacked_with_labels_at_the_left():
    red = np.full((8, 8, 3), RED, dtype=np.uint8)
    sheet = images.labelled_rows([("one", images.strip([red, red], gap=3)), ("three hundred", red)])
    assert sheet.shape[0] == 2 * 8 + 3 * 4
    assert (sheet == np.array(RED)).all(-1).sum() == 3 * 8 * 8
    left = sheet[:, : sheet.shape[1] - 19 - 4]
    assert (left < 128).all(-1).any()
