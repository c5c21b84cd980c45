from __future__ import annotations

import numpy as np
import pytest

from mflux_vae.images import save_image
from mflux_vae_train.dreambooth.config import DreamBoothSettings


def subject(index: int) -> np.ndarray:
    """A 16 px wide image, orange above purple; slightly different for each index."""
    picture = np.zeros((20, 16, 3), dtype=np.uint8)
    picture[:10], picture[10:] = (255, 140 + index, 0), (128, 0, 120 + index)
    return picture


@pytest.fixture
def instance_dir(tmp_path):
    """A folder with five images and another file."""
    folder = tmp_path / "instance"
    for index in range(5):
        save_image(folder / f"picture-{index}.png", subject(index))
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def short_run(instance_dir, tmp_path):
    """Makes settings of a short run on the fake pipeline."""

    def make(**changes) -> DreamBoothSettings:
        given = {
            "model": "fake",
            "output_dir": str(tmp_path / "out"),
            "max_train_steps": 6,
            "lr_warmup_steps": 1,
            "num_validation_images": 0,
        }
        if "concepts" not in changes:
            given |= {"instance_data_dir": str(instance_dir), "instance_prompt": "a photo of sks dog"}
        return DreamBoothSettings(**{**given, **changes})

    return make
