"""What a data set says about images that are converted, and about masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mflux_vae.image_files import profiles
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.images import load_image, load_mask, save_image
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.data import class_images
from mflux_vae_train.dreambooth.data.dataset import InstanceDataset, load_dataset

PROMPT = "a photo of sks star"
P3 = profiles.matrix_profile("Display P3", profiles.DISPLAY_P3, profiles.SRGB_CURVE)


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def load(folder: Path, **changes) -> InstanceDataset:
    settings = DreamBoothSettings(model="fake", instance_data_dir=str(folder), instance_prompt=PROMPT, **changes)
    return load_dataset(settings, resolution=16)


def test_one_line_a_kind(tmp_path):
    for index in range(12):
        photo(index).save(tmp_path / f"p3-{index:02d}.png", icc_profile=P3)
        photo(index).save(tmp_path / f"broken-{index:02d}.png", icc_profile=b"no profile")
        photo().save(tmp_path / f"moving-{index:02d}.gif", save_all=True, append_images=[photo(1), photo(2)])
    dataset = load(tmp_path)
    (converted,) = dataset.notes
    assert "Display P3" in converted and "p3-00.png" in converted and "9 more" in converted
    broken, moving = dataset.warnings
    assert "broken-00.png" in broken and "9 more" in broken
    assert "moving-00.gif" in moving and "9 more" in moving
    assert all(len(line) < 300 for line in (*dataset.notes, *dataset.warnings))
    assert converted in dataset.summary([Concept(instance_data_dir=str(tmp_path), instance_prompt=PROMPT)])


def test_plain_images_are_not_mentioned(tmp_path):
    photo().save(tmp_path / "a.png")
    photo().save(tmp_path / "b.jpg")
    photo().save(tmp_path / "c.jpg", format="MPO", save_all=True, append_images=[photo(1)])
    dataset = load(tmp_path)
    assert not dataset.notes and not dataset.warnings and len(dataset.images) == 3


def test_class_images_are_mentioned(tmp_path):
    for index in range(4):
        photo(index).save(tmp_path / f"{index}.png", icc_profile=P3)
    photo().save(tmp_path / "pages.tiff", save_all=True, append_images=[photo(1)])
    notes = ImageNotes()
    assert len(class_images.check_class_images(tmp_path, "a dog", notes)) == 5
    assert len(notes.lines(20)) == len(notes.warnings) == 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_is_black_in_masks(tmp_path, mode):
    """White where the subject is, and transparent (white, too) elsewhere."""
    opacity = np.zeros((16, 16), np.uint8)
    opacity[4:12, 2:9] = 255
    image = Image.fromarray(np.dstack([np.full((16, 16, 3), 255, np.uint8), opacity]))
    options = {}
    if mode == "P":
        image = Image.fromarray((opacity > 0).astype(np.uint8)).convert("P")
        image.putpalette([255] * 6)
        options = {"transparency": 0}
    else:
        image = image.convert(mode)
    photo().save(tmp_path / "a.png")
    image.save(tmp_path / "a-mask.png", **options)
    (one,) = load(tmp_path, masked_loss=True).images
    assert one.mask is not None
    np.testing.assert_array_equal(load_mask(one.mask, notes=ImageNotes())[..., 0], opacity)


def test_translucent_parts_weigh_less(tmp_path):
    Image.new("LA", (16, 16), (200, 128)).save(tmp_path / "m.png")
    mask = load_mask(tmp_path / "m.png", notes=ImageNotes())
    assert mask.shape == (16, 16, 1) and abs(int(mask[0, 0, 0]) - 100) <= 1


@pytest.mark.parametrize("level", [255, 90])
def test_a_mask_of_one_level_is_a_warning(tmp_path, level):
    for index in range(5):
        photo(index).save(tmp_path / f"{index}.png")
        save_image(tmp_path / f"{index}-mask.png", np.full((16, 16, 3), level, np.uint8))
    (line,) = load(tmp_path, masked_loss=True).warnings
    assert "one level" in line and "0-mask.png" in line and "2 more" in line


def test_profiles_do_not_change_masks(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    photo().save(tmp_path / "a.png")
    Image.fromarray(levels).convert("RGB").save(tmp_path / "a-mask.png", icc_profile=P3)
    dataset = load(tmp_path, masked_loss=True)
    assert not dataset.notes and not dataset.warnings
    mask = load_mask(dataset.images[0].mask, notes=ImageNotes())
    np.testing.assert_array_equal(mask[..., 0], levels)


def test_reading_again_says_nothing(tmp_path, caplog):
    photo().save(tmp_path / "a.png", icc_profile=P3)
    (one,) = load(tmp_path).images
    one.pixels.clear()
    with caplog.at_level("INFO"):
        np.testing.assert_array_equal(one.read(one.square), load_image(tmp_path / "a.png", notes=ImageNotes()))
    assert not caplog.records
