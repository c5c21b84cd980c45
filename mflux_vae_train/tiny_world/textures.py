"""The backgrounds of the world: six periodic textures.

Each texture is drawn once at a large size and reduced by area, so that images of different sizes show the same scene.
A scene shifts the texture: by any amount for grass, sand, snow and night, but only slightly for brick and sea, whose
regular lines a small model cannot learn otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw

MASTER = 512
RGB = tuple[int, int, int]


class _Tile:
    """A canvas with periodic edges."""

    def __init__(self, base: RGB, seed: int):
        self.image = Image.new("RGB", (MASTER, MASTER), base)
        self._draw = ImageDraw.Draw(self.image)
        self.rng = np.random.default_rng(seed)

    def between(self, low: RGB, high: RGB) -> RGB:
        """A random colour on the line between two."""
        t = self.rng.random()
        red, green, blue = (round(a + t * (b - a)) for a, b in zip(low, high, strict=True))
        return red, green, blue

    def _offsets(self) -> list[tuple[int, int]]:
        return [(dx, dy) for dx in (-MASTER, 0, MASTER) for dy in (-MASTER, 0, MASTER)]

    def line(self, x0: float, y0: float, x1: float, y1: float, width: int, fill: RGB) -> None:
        for dx, dy in self._offsets():
            self._draw.line((x0 + dx, y0 + dy, x1 + dx, y1 + dy), fill=fill, width=width)

    def dot(self, x: float, y: float, radius: float, fill: RGB) -> None:
        for dx, dy in self._offsets():
            self._draw.ellipse((x + dx - radius, y + dy - radius, x + dx + radius, y + dy + radius), fill=fill)

    def place(self) -> tuple[float, float]:
        x, y = self.rng.uniform(0, MASTER, 2)
        return float(x), float(y)


def _grass() -> Image.Image:
    tile = _Tile((66, 88, 46), 1)
    for _ in range(520):
        x, y = tile.place()
        lean, length = tile.rng.normal(0, 12), tile.rng.uniform(36, 72)
        tile.line(x, y, x + lean, y - length, 8, tile.between((50, 72, 34), (94, 116, 62)))
    return tile.image


def _sand() -> Image.Image:
    tile = _Tile((217, 198, 156), 2)
    for _ in range(900):
        tile.dot(*tile.place(), tile.rng.uniform(3, 7), tile.between((196, 172, 128), (233, 219, 184)))
    return tile.image


def _snow() -> Image.Image:
    tile = _Tile((178, 199, 224), 3)
    for _ in range(110):
        tile.dot(*tile.place(), tile.rng.uniform(30, 60), tile.between((170, 192, 219), (188, 207, 230)))
    for _ in range(110):
        tile.dot(*tile.place(), tile.rng.uniform(5, 9), (222, 232, 246))
    return tile.image


def _night() -> Image.Image:
    tile = _Tile((20, 22, 54), 4)
    for _ in range(90):
        tile.dot(*tile.place(), tile.rng.uniform(30, 70), tile.between((16, 18, 46), (26, 28, 64)))
    for cell in range(36):  # one star per cell of a grid, so that they are spread evenly
        x, y = (cell % 6 + tile.rng.random()) * MASTER / 6, (cell // 6 + tile.rng.random()) * MASTER / 6
        tile.dot(float(x), float(y), tile.rng.uniform(4, 9), tile.between((190, 190, 195), (245, 240, 205)))
    return tile.image


def _brick() -> Image.Image:
    tile = _Tile((168, 152, 142), 5)
    width, height, joint = 128, 64, 10
    draw = ImageDraw.Draw(tile.image)
    for row in range(MASTER // height):
        for column in range(MASTER // width):
            left, top = column * width + (row % 2) * width // 2, row * height
            fill = tile.between((112, 60, 50), (136, 74, 60))
            for x in (left, left - MASTER):
                draw.rectangle((x + joint, top + joint, x + width - 1, top + height - 1), fill=fill)
    return tile.image


def _sea() -> Image.Image:
    y, x = np.mgrid[0:MASTER, 0:MASTER].astype(np.float32) * (2 * np.pi / MASTER)
    phase = 8 * y + 0.9 * np.sin(4 * x) * np.sign(np.sin(4 * y + 0.01))
    crest = np.clip(np.cos(phase) * 2.2 - 1.2, 0, 1)[..., None]
    swell = (np.cos(phase - 0.8) * 0.5 + 0.5)[..., None]
    water = np.asarray((26, 92, 112), np.float32) + swell * np.asarray((18, 24, 22), np.float32)
    foam = np.asarray((124, 186, 190), np.float32)
    return Image.fromarray((water + crest * (foam - water)).astype(np.uint8))


_TEXTURES: dict[str, tuple[Callable[[], Image.Image], float]] = {
    "grass": (_grass, 1.0),
    "sand": (_sand, 1.0),
    "snow": (_snow, 1.0),
    "night": (_night, 1.0),
    "brick": (_brick, 0.06),
    "sea": (_sea, 0.06),
}

BACKGROUNDS = tuple(_TEXTURES)


@cache
def _master(background: str) -> Image.Image:
    return _TEXTURES[background][0]()


@lru_cache(maxsize=64)
def tile(background: str, size: int) -> np.ndarray:
    """The unshifted texture as float32 (size, size, 3) in [0, 255]; shared and read-only."""
    pixels = np.asarray(_master(background).resize((size, size), Image.Resampling.BOX), np.float32)
    pixels.setflags(write=False)
    return pixels


def texture(background: str, size: int, seed: int) -> np.ndarray:
    """The texture as float32 (size, size, 3) in [0, 255], shifted by random multiples of 1/64 of the side."""
    reach = _TEXTURES[background][1]
    shifts = np.random.default_rng(seed).integers(-round(32 * reach), round(32 * reach) + 1, 2) / 64
    return np.roll(tile(background, size), [round(float(s) * size) for s in shifts], axis=(0, 1))
