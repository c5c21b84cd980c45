"""Copies of an image are found, other images are not taken for copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mflux_vae.images import covered, load_image
from mflux_vae.previews import synthetic_images
from mflux_vae_train.dreambooth.data.near_copies import near_copies, thumbnail

PHOTOS = Path(__file__).parents[5] / "shared" / "data" / "dreambooth"
"""Photographs of the DreamBooth data set, in a folder beside the checkout."""

COPIES = {
    "resized": lambda image: image.resize((40, 40)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": lambda image: image.crop((3, 2, 60, 59)),
    "cropped at one side, mirrored": lambda image: image.crop((6, 0, 64, 64)).transpose(0),
    "brighter": lambda image: image.point(lambda level: 30 + 0.8 * level),
}


def small(image: Image.Image | np.ndarray) -> np.ndarray:
    return thumbnail(covered(np.asarray(image), (64, 64)))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.fromarray(one.transpose(1, 2, 0)) for one in synthetic_images(6, 64)]


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES)
def test_a_copy_is_found_in_either_order(images, change):
    plain = [small(image) for image in images]
    assert near_copies([*plain, small(change(images[2]))]) == [(2, 6)]
    assert near_copies([small(change(images[2])), *plain]) == [(0, 3)]


def test_flat_and_striped_images_are_not_compared():
    stripes = np.repeat(np.arange(0, 64, dtype=np.uint8)[:, None, None] % 8 * 30, 64, axis=1).repeat(3, axis=2)
    assert near_copies([small(stripes), small(stripes), small(0 * stripes), small(0 * stripes)]) == []
    assert near_copies([]) == []


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"there are no photographs in {PHOTOS}")
def test_photographs_of_a_subject_are_no_copies(tmp_path):
    for subject in ("red_cartoon", "vase", "teapot"):  # the most alike
        paths = sorted((PHOTOS / subject).glob("*.jpg"))
        photos = [load_image(path, resolution=64) for path in paths]
        assert near_copies([small(photo) for photo in photos]) == []
        whole = Image.open(paths[1])
        width, height = whole.size
        part = whole.crop((width // 20, height // 15, width, height)).resize((200, 200 * height // width))
        part.save(tmp_path / "again.jpg", quality=40)
        again = load_image(tmp_path / "again.jpg", resolution=64)
        assert near_copies([small(photo) for photo in [*photos, again]]) == [(1, len(photos))]
