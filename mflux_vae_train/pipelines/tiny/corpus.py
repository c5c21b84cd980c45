"""Pictures the embedded pipeline's autoencoder learns from: scenes of the world, and crops of photographs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from mflux_vae_train.pipelines.tiny.world import training_example

_PHOTOGRAPHS = {
    "skimage": ("data", ("*.png", "*.jpg")),
    "sklearn": ("datasets/images", ("*.jpg",)),
}
_DRAWINGS = {"chessboard_GRAY", "chessboard_RGB", "color", "horse", "logo", "page", "phantom", "text"}
_SMALLEST_CROP = 80


def scenes(seed: int, count: int, size: int) -> np.ndarray:
    """The first `count` training scenes. uint8 (count, size, size, 3)."""
    return np.stack([training_example(seed, index, size)[0] for index in range(count)])


def photographs(folders: Sequence[Path] = ()) -> list[Image.Image]:
    """Sample photographs of scikit-image and scikit-learn where installed, and all pictures below `folders`."""
    files: list[Path] = []
    for package, (below, patterns) in _PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            root = Path(spec.origin).parent / below
            files += sorted(f for pattern in patterns for f in root.glob(pattern) if f.stem not in _DRAWINGS)
    for folder in folders:
        files += sorted(f for f in folder.rglob("*") if f.suffix.lower() in {".jpg", ".jpeg", ".png"})
    return [Image.open(file).convert("RGB") for file in files]


def crops(pictures: Sequence[Image.Image], seed: int, count: int, size: int) -> np.ndarray:
    """Random square crops of any scale, mirrored half of the time. uint8 (count, size, size, 3)."""
    out = np.empty((count, size, size, 3), np.uint8)
    for index in range(count):
        rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
        picture = pictures[int(rng.integers(len(pictures)))]
        short = min(picture.size)
        side = int(round(np.exp(rng.uniform(np.log(min(_SMALLEST_CROP, short)), np.log(short)))))
        x, y = (int(rng.integers(length - side + 1)) for length in picture.size)
        crop = picture.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
        out[index] = np.asarray(crop)[:, :: -1 if rng.random() < 0.5 else 1]
    return out
