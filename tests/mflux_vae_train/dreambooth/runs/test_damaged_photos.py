"""Training on photographs whose metadata were damaged is training on the photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.dataset import InstanceDataset, load_dataset
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines import tiny
from tests.helpers.damage_metadata import DAMAGES, copy_damaged

PHOTOS = Path(__file__).parents[5] / "shared" / "data" / "dreambooth"
"""Photographs of the DreamBooth data set, in a folder beside the checkout."""

pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"there are no photographs in {PHOTOS}")


def subjects() -> list[Path]:
    return sorted(folder for folder in PHOTOS.iterdir() if folder.is_dir())


def load(folder: Path, *, resolution: int = 64) -> InstanceDataset:
    settings = DreamBoothSettings(model="tiny", instance_data_dir=str(folder), instance_prompt="a photo of sks toy")
    return load_dataset(settings, resolution=resolution, multiple=8)


def test_training_images_are_the_same(tmp_path):
    damaged: set[str] = set()
    for folder in subjects()[:8]:
        damaged |= {*copy_damaged(folder, tmp_path / folder.name, first=len(damaged)).values()}
        before, after = load(folder), load(tmp_path / folder.name)
        assert not before.warnings and not before.notes and not after.notes
        assert len(before.images) == len(after.images) > 3
        for one, other in zip(before.images, after.images, strict=True):
            assert one.path.name == other.path.name and one.path.read_bytes() != other.path.read_bytes()
            assert one.crops == other.crops
            np.testing.assert_array_equal(one.read(one.square), other.read(other.square), err_msg=one.path.name)
    assert damaged == DAMAGES["JPEG"].keys()


@pytest.mark.slow
def test_the_adapter_is_the_same(tmp_path):
    folder = next(folder for folder in subjects() if folder.name == "dog6")
    copy_damaged(folder, tmp_path / "damaged", first=17)
    adapters = []
    for index, data in enumerate((folder, tmp_path / "damaged")):
        settings = DreamBoothSettings(
            model="tiny",
            instance_data_dir=str(data),
            instance_prompt="a photo of sks dog",
            output_dir=str(tmp_path / f"run-{index}"),
            prior_preservation="none",
            num_validation_images=0,
            max_train_steps=3,
            lr_warmup_steps=0,
            gradient_accumulation_steps=1,
        )
        DreamBooth(tiny.load()).train(settings)
        adapters.append((tmp_path / f"run-{index}" / "pytorch_lora_weights.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
