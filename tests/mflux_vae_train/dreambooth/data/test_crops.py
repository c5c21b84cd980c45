from __future__ import annotations

import math

import numpy as np
import pytest

from mflux_vae.errors import SettingsError
from mflux_vae.images import averaged, covered
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.crops import Crop, bucket_shapes, crops, nearest_shape
from mflux_vae_train.pipelines.capabilities import CropGeometry


def settings(**changes) -> DreamBoothSettings:
    return DreamBoothSettings(model="x", instance_data_dir="y", instance_prompt="z", **changes)


def ramp(height: int, width: int) -> np.ndarray:
    """Red increases to the right, green downwards."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([255 * columns / width, 255 * rows / height, 0 * rows], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "crop", "corner"),
    [
        ((100, 200), Crop(shape=(50, 50)), (0, 25)),
        ((100, 200), Crop(shape=(50, 50), offset=0.0), (0, 0)),
        ((100, 200), Crop(shape=(50, 50), offset=0.0, mirrored=True), (0, 50)),
        ((300, 100), Crop(shape=(200, 200), offset=1.0, mirrored=True), (400, 0)),
        ((64, 64), Crop(shape=(64, 64), offset=0.7), (0, 0)),
    ],
)
def test_the_corner_of_a_crop_is_in_pixels_of_the_resized_image(size, crop, corner):
    geometry = crop.geometry(size)
    assert geometry == CropGeometry(original=size, corner=corner, target=crop.shape)


def test_default_shape_is_a_square():
    assert bucket_shapes(settings(), resolution=512, multiple=16) == [(512, 512)]


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024])
def test_buckets_have_the_area_of_the_resolution_and_valid_sides(resolution):
    found = bucket_shapes(settings(use_aspect_ratio_buckets=True), resolution=resolution, multiple=16)
    assert (resolution, resolution) in found
    for height, width in found:
        assert height % 16 == width % 16 == 0
        assert (width, height) in found, "buckets are symmetric"
        # rounding a side by at most 8 pixels
        assert abs(math.log(height * width / resolution**2)) <= 8 / height + 8 / width + 0.02


def test_eleven_shapes_at_512():
    found = bucket_shapes(settings(use_aspect_ratio_buckets=True), resolution=512, multiple=16)
    assert len(found) == 11 and (416, 624) in found and (720, 368) in found


def test_custom_buckets_are_parsed_and_validated():
    custom = settings(aspect_ratio_buckets=" 512,512; 384, 640;512,512")
    assert bucket_shapes(custom, resolution=512, multiple=16) == [(512, 512), (384, 640)]
    for text, word in (
        ("512", "height,width"),
        ("512,-1", "height"),
        ("512,500", "16"),
        ("0,0", "16"),
    ):
        with pytest.raises(SettingsError, match=word):
            bucket_shapes(settings(aspect_ratio_buckets=text), resolution=512, multiple=16)


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 100), (4, 4)), ((100, 160), (4, 8)), ((100, 130), (4, 4)), ((900, 400), (8, 4))]
)
def test_nearest_shape_has_the_nearest_aspect_ratio(size, expected):
    assert nearest_shape(size, [(4, 4), (4, 8), (8, 4)]) == expected


def test_offsets_run_from_one_end_to_the_other():
    picture = ramp(30, 90)
    rows = crops((30, 90), (30, 30), count=3, mirror=True)
    assert [[crop.mirrored for crop in row] for row in rows] == [[False, True]] * 3
    for row, left in zip(rows, (0, 30, 60), strict=True):
        plain, mirrored = (crop.apply(picture) for crop in row)
        np.testing.assert_array_equal(plain, picture[:, left : left + 30])
        np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    assert len(crops((30, 30), (10, 10), count=3, mirror=False)) == 1, "nothing is cut: one offset"
    assert crops((30, 90), (30, 30), count=1, mirror=False) == [[Crop(shape=(30, 30))]]


@pytest.mark.parametrize("size", [(7, 31), (31, 7), (16, 16), (100, 33)])
@pytest.mark.parametrize("shape", [(16, 8), (8, 16), (32, 32)])
def test_crops_have_the_shape_and_are_not_distorted(size, shape):
    crop = covered(ramp(*size), shape).astype(float)
    assert crop.shape == (*shape, 3)
    # the same scale in both directions
    across, down = (
        np.gradient(crop[..., 0], axis=1).mean() * size[1],
        np.gradient(crop[..., 1], axis=0).mean() * size[0],
    )
    assert across == pytest.approx(down, rel=0.25)


def test_averaged_computes_block_means():
    picture = np.random.default_rng(0).integers(0, 256, (32, 16, 1), dtype=np.uint8)
    expected = picture.reshape(4, 8, 2, 8).mean(axis=(1, 3))
    np.testing.assert_allclose(averaged(picture, (4, 2))[..., 0], expected, atol=1)
