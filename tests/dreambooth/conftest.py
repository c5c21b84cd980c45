from __future__ import annotations

import numpy as np
import pytest

from mflux_vae.images import save_image


def subject(index: int) -> np.ndarray:
    """A 16 px picture: orange above purple, a little different each time."""
    picture = np.zeros((20, 16, 3), dtype=np.uint8)
    picture[:10], picture[10:] = (255, 140 + index, 0), (128, 0, 120 + index)
    return picture


@pytest.fixture
def instance_dir(tmp_path):
    """Five pictures of a subject, and a file that is none."""
    folder = tmp_path / "instance"
    for index in range(5):
        save_image(folder / f"picture-{index}.png", subject(index))
    (folder / "notes.txt").write_text("no picture")
    return folder
