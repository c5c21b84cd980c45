from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mflux_vae import images
from mflux_vae.errors import ImageError
from tests.mflux_vae.odd_images import PICTURES

RED, WHITE = (255, 0, 0), (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (0, 0, 10, 20))  # red at the left ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... rotated: red belongs at the top
    image.save(tmp_path / "turned.png", exif=exif)
    picture = images.load_image(tmp_path / "turned.png")
    assert picture.shape == (40, 20, 3)
    assert tuple(picture[2, 10]) == RED and tuple(picture[30, 10]) == WHITE


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (20, 20), (7, 90)])
def test_centre_square_is_cropped(tmp_path, size):
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


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("channels", [1, 3])
def test_odd_images_are_read_right_or_refused_in_one_line(tmp_path, name, channels):
    odd, path = PICTURES[name], tmp_path / name
    odd.write(path)
    if odd.error is not None:
        with pytest.raises(ImageError, match=odd.error) as error:
            images.load_images([path], channels=channels)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return
    (picture,) = images.load_images(path, channels=channels)
    assert picture.dtype == np.uint8 and picture.shape == (*odd.size, channels)
    red, green, blue = odd.colour
    expected = odd.colour if channels == 3 else 0.299 * red + 0.587 * green + 0.114 * blue
    np.testing.assert_allclose(picture, np.broadcast_to(expected, picture.shape), atol=2)


def test_first_frame_is_used_and_logged(tmp_path, caplog):
    PICTURES["animated.gif"].write(tmp_path / "animated.gif")
    with caplog.at_level("INFO", logger="mflux_vae"):
        images.load_image(tmp_path / "animated.gif")
    assert "several frames" in caplog.text


ARRAYS = {
    "grey": (np.full((4, 6), 77, np.uint8), 77),
    "one channel": (np.full((4, 6, 1), 77, np.uint8), 77),
    "bool": (np.ones((4, 6), bool), 255),
    "16 bits": (np.full((4, 6, 3), 77 * 257, np.uint16), 77),
    "float": (np.full((4, 6, 3), 76.6, np.float32), 77),
    "black floats": (np.zeros((4, 6, 3)), 0),
    "opacity": (np.dstack([np.zeros((4, 6, 3)), np.full((4, 6), 0.0)]), 255),
    "16 bits with opacity": (np.full((4, 6, 4), 65535, np.uint16), 255),
    "strided": (np.full((8, 12, 3), 77, np.uint8)[::2, ::2], 77),
    "pillow": (Image.new("CMYK", (6, 4), (0, 0, 0, 0)), 255),
    "mlx": (mx.full((4, 6, 3), 77, mx.uint8), 77),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_images(kind):
    source, level = ARRAYS[kind]
    for channels in (1, 3):
        (picture,) = images.load_images([source], channels=channels)
        assert picture.dtype == np.uint8 and picture.shape == (4, 6, channels) and (picture == level).all()


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (np.full((4, 6, 3), np.nan), "NaN"),
        (np.full((4, 6, 3), np.inf), "infinite"),
        (np.full((4, 6, 3), -0.5), "-0.5"),
        (np.full((4, 6, 3), 256), "256"),
        (np.full((4, 6, 3), 0.5), "255"),
        (np.zeros((3, 4, 6), np.uint8), r"array \(3, 4, 6\)"),
        (np.zeros((1, 3, 4, 6), np.uint8), r"array \(1, 3, 4, 6\)"),
        (np.zeros((0, 6, 3), np.uint8), r"array \(0, 6, 3\)"),
        (np.zeros((4, 6), complex), "array of complex128"),
        (7, r"array \(\)"),
        (None, "a NoneType"),
        (b"bytes", "a bytes"),
        (Image.new("F", (4, 4)), "floating-point"),
    ],
)
def test_bad_sources_are_refused_with_their_index(source, word):
    with pytest.raises(ImageError, match=rf"image 1 .*{word}"):
        images.load_images([np.zeros((4, 6, 3), np.uint8), source])


def test_other_channel_counts_need_arrays():
    with pytest.raises(ImageError, match="4"):
        images.load_images([], channels=4)


def test_to_pixels_and_to_pictures_are_inverse_and_clip():
    levels = np.arange(256, dtype=np.uint8)
    assert (images.to_pictures(images.to_pixels(levels)) == levels).all()
    assert images.to_pixels(levels).min() == -1 and images.to_pixels(levels).max() == 1
    assert images.to_pictures(np.array([-7.0, 7.0, np.nan, np.inf])).tolist() == [0, 255, 0, 255]


def test_save_image_round_trip_with_text(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    images.save_image(tmp_path / "deep" / "image.png", noise, text={"prompt": "a photo of a café"})
    assert (images.load_image(tmp_path / "deep" / "image.png") == noise).all()
    assert images.image_text(tmp_path / "deep" / "image.png") == {"prompt": "a photo of a café"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["image.png"]


def test_labelled_rows():
    red = np.full((8, 8, 3), RED, dtype=np.uint8)
    sheet = images.labelled_rows([("one", images.strip([red, red], gap=3)), ("three hundred", red)])
    assert sheet.shape[0] == 2 * 8 + 3 * 4
    assert (sheet == np.array(RED)).all(-1).sum() == 3 * 8 * 8
    left = sheet[:, : sheet.shape[1] - 19 - 4]
    assert (left < 128).all(-1).any()


def test_grey_images_stay_grey_and_failed_saves_leave_nothing(tmp_path):
    images.save_image(tmp_path / "grey.png", np.full((4, 6, 1), 77, np.uint8))
    with Image.open(tmp_path / "grey.png") as image:
        assert image.mode == "L" and image.size == (6, 4)
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError):
        images.save_image(tmp_path / "taken.png", np.zeros((4, 6, 3), np.uint8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grey.png", "taken.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_strip_has_white_gaps(channels):
    left, right = np.full((4, 6, channels), 10, np.uint8), np.full((4, 3, channels), 20, np.uint8)
    assert images.strip([left, right], gap=2)[2, :, 0].tolist() == [10] * 6 + [255] * 2 + [20] * 3


def test_a_folder_in_place_of_an_image_is_named(tmp_path):
    for load in (images.load_image, images.load_images, images.image_text, lambda path: images.load_images([path])):
        with pytest.raises(ImageError, match="folder"):
            load(tmp_path)
