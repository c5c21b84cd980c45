"""Synthetic digits in Pillow's default font: a data set without a download."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mflux_vae_train.randomness import Stream, rng
from mflux_vae_train.vae.data.sources import to_channels


class Digits:
    """Light digits on dark with random rotation, shear, stretch, shift, thickness and noise. A `batches.Source`.

    Image i is a function of (seed, i).
    """

    def __init__(self, count: int, *, seed: int, size: int = 28, channels: int = 1) -> None:
        self.count, self.seed, self.size, self.channels = count, seed, size, channels
        self.starts: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> int:
        """The digit shown in an image."""
        return int(rng(self.seed, Stream.DIGITS, index).integers(10))

    def item(self, index: int) -> np.ndarray:
        draw = rng(self.seed, Stream.DIGITS, index)
        digit = int(draw.integers(10))
        side = 2 * self.size  # draw at twice the size, for smooth edges
        canvas = Image.new("L", (side, side))
        thickness = draw.uniform(0, side / 24)
        ImageDraw.Draw(canvas).text(
            (side / 2, side / 2),
            str(digit),
            fill=255,
            font=_font(round(0.92 * side)),
            anchor="mm",
            stroke_width=round(thickness),
        )
        turn, shear = draw.normal(0, 0.12), draw.normal(0, 0.15)
        stretch, shift = draw.uniform(0.85, 1.15, 2), draw.uniform(-0.07, 0.07, 2) * side
        # maps result pixels to canvas pixels, around both centres
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        matrix = 2 * np.diag(1 / stretch) @ np.array([[1, shear], [0, 1]]) @ rotation
        offset = side / 2 + shift - matrix @ np.full(2, self.size / 2)
        values = (*matrix[0], offset[0], *matrix[1], offset[1])
        drawn = canvas.transform((self.size,) * 2, Image.Transform.AFFINE, values, Image.Resampling.BICUBIC)
        light, noise = draw.uniform(0.75, 1), draw.uniform(0, 8)
        picture = np.asarray(drawn, np.float32) * light + draw.normal(0, noise, drawn.size)
        return to_channels(np.clip(np.rint(picture), 0, 255).astype(np.uint8)[..., None], self.channels)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
