"""A small DINO and a small CLIP with random weights, made by `tests.parity.evaluation.make_golden`, and images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
DINO, CLIP = GOLDEN / "dino", GOLDEN / "clip"
"""Folders for `Dino.from_pretrained` and `Clip.from_pretrained`."""

WORDS = ("a", "photo", "of", "dog", "red", "blue", "star", "on", "grass")
PROMPTS = ["a photo of a dog", "", "red star on blue grass, a photo of a red star on the blue grass"]
"""The last one has more tokens than the small CLIP reads."""

SIZES = ((41, 70), (64, 33), (36, 36))
"""Heights and widths: enlarged and reduced, with odd margins of the crop."""


def noise_images(sizes: tuple[tuple[int, int], ...] = SIZES, seed: int = 0) -> list[np.ndarray]:
    """Waves with noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    images = []
    for height, width in sizes:
        y, x = np.mgrid[:height, :width, :3][:2]
        waves = 127 + 80 * np.sin(x / (3 + 4 * rng.random(3)) + y / 7) + 30 * rng.normal(size=(height, width, 3))
        images.append(np.clip(waves, 0, 255).astype(np.uint8))
    return images
