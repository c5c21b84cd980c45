"""How often a run decodes and hashes image files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mflux_vae import images
from mflux_vae_train.dreambooth import cli, precompute
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data import dataset, encoding
from mflux_vae_train.pipelines import registry
from tests.contracts.fake import FakePipeline

CROPS = ["--no_center_crop", "--num_crops=3", "--random_flip", "--use_aspect_ratio_buckets"]


@pytest.fixture
def counts(monkeypatch):
    """Decodes and hashes of each file until all images are encoded."""
    decoded, hashed = Counter(), Counter()
    read, content_hash, encode = images.read_file, dataset.content_hash, precompute.encode_dataset

    def count(counter, function):
        def counted(path, *rest, **options):
            counter[Path(path).name] += 1
            return function(path, *rest, **options)

        return counted

    def until_encoded(*args, **options):
        encoded = encode(*args, **options)
        monkeypatch.setattr(images, "read_file", read)
        return encoded

    monkeypatch.setattr(images, "read_file", count(decoded, read))
    for module in (dataset, encoding):
        monkeypatch.setattr(module, "content_hash", count(hashed, content_hash))
    monkeypatch.setattr(precompute, "encode_dataset", until_encoded)
    monkeypatch.setattr(registry, "open_pipeline", lambda model, **_: FakePipeline())
    return decoded, hashed


def run(instance_dir, tmp_path, *flags: str) -> None:
    given = ["--model=fake", f"--instance_data_dir={instance_dir}", "--instance_prompt=a photo of sks dog"]
    given += [f"--output_dir={tmp_path / 'out'}", "--max_train_steps=1", "--prior_preservation=none"]
    assert cli.main([*given, "--num_validation_images=1", *flags]) == 0


@pytest.mark.parametrize("flags", [[], CROPS])
def test_each_instance_image_is_decoded_and_hashed_once(instance_dir, tmp_path, counts, flags):
    run(instance_dir, tmp_path, *flags)
    expected = {f"picture-{index}.png": 1 for index in range(5)}
    assert counts == (expected, expected)


def test_crops_beyond_the_memory_limit_are_read_again(instance_dir, tmp_path, counts, monkeypatch):
    square = 16 * 16 * 3
    monkeypatch.setattr(dataset, "MAX_PIXEL_BYTES", 2 * square)
    run(instance_dir, tmp_path)
    decoded, _ = counts
    assert sorted(decoded.values()) == [1, 1, 2, 2, 2]


def test_crops_in_memory_equal_those_from_the_file_and_are_released(instance_dir):
    loaded = dataset.load_dataset(settings(instance_dir), resolution=16, multiple=4)
    image = loaded.images[0]
    crops = [crop for row in image.crops for crop in row]
    assert len(crops) == 6 and image.pixels
    kept = [image.read(crop) for crop in crops]
    loaded.release()
    assert list(image.pixels) == [image.square]
    for crop, pixels in zip(crops, kept, strict=True):
        np.testing.assert_array_equal(pixels, image.read(crop))


def settings(instance_dir):
    return DreamBoothSettings(
        model="fake",
        instance_data_dir=str(instance_dir),
        instance_prompt="a photo of sks dog",
        center_crop=False,
        num_crops=3,
        random_flip=True,
    )
