"""Training images of the embedded pipeline: scenes of the world, and crops of photographs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.images import load_image
from mflux_vae_train.tiny_world.words import NAMES, article
from mflux_vae_train.tiny_world.world import training_example

_PHOTOGRAPHS = {
    "skimage": ("data", ("*.png", "*.jpg")),
    "sklearn": ("datasets/images", ("*.jpg",)),
}
_DRAWINGS = {"chessboard_GRAY", "chessboard_RGB", "color", "horse", "logo", "page", "phantom", "text"}
_CROPS, _IN_A_GROUP = 2, 5
_SMALLEST_CROP = 80
"""Pixels of a photograph; smaller crops are blurred."""

OBJECTS = tuple(
    """backpack bear boot bowl can candle car cat clock cup dog drawing duck emoji flower glasses house
    monster painting plate robot shoe sneaker teapot toy tree vase wolf""".split()
)
"""Nouns in captions of photographs, chosen at random: the model only learns that these are not shapes."""


def scenes(seed: int, count: int, size: int) -> np.ndarray:
    """The first `count` training scenes. uint8 (count, size, size, 3)."""
    return np.stack([training_example(seed, index, size)[0] for index in range(count)])


def photographs(folders: Sequence[Path] = ()) -> list[Image.Image]:
    """Sample photographs of scikit-image and scikit-learn, if installed, and all images in `folders` and below."""
    files: list[Path] = []
    for package, (below, patterns) in _PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            root = Path(spec.origin).parent / below
            files += sorted(f for pattern in patterns for f in root.glob(pattern) if f.stem not in _DRAWINGS)
    for folder in folders:
        files += sorted(f for f in folder.rglob("*") if f.suffix.lower() in {".jpg", ".jpeg", ".png"})
    return [Image.fromarray(load_image(file)) for file in files]


def crops(photographs: Sequence[Image.Image], seed: int, count: int, size: int, *, smallest: float = 0.0) -> np.ndarray:
    """Random square crops, mirrored half of the time. uint8 (count, size, size, 3).

    Args:
        smallest: smallest side of a crop, as a fraction of the photograph's short side.
    """
    return np.stack([_crop(photographs, seed, index, size, smallest) for index in range(count)])


def _crop(photographs: Sequence[Image.Image], seed: int, index: int, size: int, smallest: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    photograph = photographs[int(rng.integers(len(photographs)))]
    short = min(photograph.size)
    least = min(max(_SMALLEST_CROP, smallest * short), short)
    side = round(np.exp(rng.uniform(np.log(least), np.log(short))))
    x, y = (int(rng.integers(length - side + 1)) for length in photograph.size)
    crop = photograph.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
    return np.asarray(crop)[:, :: -1 if rng.random() < 0.5 else 1]


class TrainingImages:
    """Data source of the autoencoder: three scenes for every two crops of photographs.

    Attributes:
        starts: None, as images do not form sequences.

    Raises:
        ImageError: there is no photograph.
        SettingsError: a number of channels other than 3.
    """

    starts: np.ndarray | None = None

    def __init__(self, photographs: Sequence[Image.Image], *, size: int, channels: int, seed: int, count: int) -> None:
        if channels != 3:
            raise SettingsError(f"the embedded pipeline's images have 3 channels, not {channels}")
        if not photographs:
            raise ImageError("no photographs to crop: pip install 'mflux-vae[build]'")
        self.photographs, self.size, self.channels, self.seed, self.count = photographs, size, channels, seed, count

    def __len__(self) -> int:
        return self.count

    def item(self, index: int) -> np.ndarray:
        """uint8 (size, size, 3), a function of seed and index."""
        if index % _IN_A_GROUP < _CROPS:
            return _crop(self.photographs, self.seed, index, self.size)
        return training_example(self.seed, index, self.size)[0]


def data(*, size: int, channels: int, seed: int, count: int) -> TrainingImages:
    """The data set `tiny` of ``mflux-vae train``."""
    return TrainingImages(photographs(), size=size, channels=channels, seed=seed, count=count)


def photo_captions(seed: int, count: int) -> list[str]:
    """Captions for photographs: "a photo of a dog", or one time in three with a name, "a photo of zwx dog"."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, count]))
    captions = []
    for _ in range(count):
        noun = OBJECTS[int(rng.integers(len(OBJECTS)))]
        named = f"{NAMES[int(rng.integers(len(NAMES)))]} {noun}" if rng.random() < 1 / 3 else f"{article(noun)} {noun}"
        captions.append(f"a photo of {named}")
    return captions
