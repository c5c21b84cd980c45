"""Views of a picture: the shape it is trained in, the places it is cut at, mirrored or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mflux_vae.errors import SettingsError
from mflux_vae.images import covered
from mflux_vae_train.dreambooth.config import DreamBoothSettings

Shape: TypeAlias = "tuple[int, int]"
"""Height and width in pixels."""

ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)
"""Height to width of the shapes of ``--use_aspect_ratio_buckets``: those of diffusers' scripts."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """How a picture is seen.

    Attributes:
        shape: height and width it is resized to, after what does not fit was cut off.
        place: where the part that is kept lies, see `images.covered`.
        mirrored: left and right are exchanged.
    """

    shape: Shape
    place: float = 0.5
    mirrored: bool = False

    def of(self, picture: np.ndarray) -> np.ndarray:
        """uint8 (H, W, C) -> (*shape, C)."""
        seen = covered(picture, self.shape, place=self.place)
        return np.ascontiguousarray(seen[:, ::-1]) if self.mirrored else seen


def shapes(settings: DreamBoothSettings, *, resolution: int, multiple: int) -> list[Shape]:
    """The shapes that pictures are trained in.

    Args:
        multiple: sides are multiples of this many pixels.

    Raises:
        SettingsError: ``--aspect_ratio_buckets`` cannot be read, or holds a side that is no such multiple.
    """
    if settings.aspect_ratio_buckets is not None:
        return _parsed(settings.aspect_ratio_buckets, multiple)
    if not settings.use_aspect_ratio_buckets:
        return [(resolution, resolution)]
    sides = [(resolution * math.sqrt(aspect), resolution / math.sqrt(aspect)) for aspect in ASPECTS]
    rounded = [tuple(max(1, round(side / multiple)) * multiple for side in pair) for pair in sides]
    return list(dict.fromkeys((height, width) for height, width in rounded))


def _parsed(text: str, multiple: int) -> list[Shape]:
    found = []
    for pair in text.split(";"):
        sides = pair.split(",")
        if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
            raise SettingsError(f"--aspect_ratio_buckets: {pair.strip()!r} is no 'height,width'")
        height, width = (int(side) for side in sides)
        if not height or not width or height % multiple or width % multiple:
            raise SettingsError(f"--aspect_ratio_buckets: {height},{width}: multiples of {multiple} are needed")
        found.append((height, width))
    return list(dict.fromkeys(found))


def nearest(size: Shape, among: Sequence[Shape]) -> Shape:
    """The shape that least has to be cut off for, the first of equals."""
    return min(among, key=lambda shape: abs(math.log(size[0] / size[1]) - math.log(shape[0] / shape[1])))


def views(size: Shape, shape: Shape, *, crops: int, mirror: bool) -> list[list[Crop]]:
    """By place, and there as it is and, with `mirror`, mirrored: what samples of a picture are drawn from.

    Args:
        size: of the picture.
        crops: how many places, evenly from one end to the other; 1 for the centre. A picture that nothing is cut
            off from has one place.
    """
    scale = min(size[0] / shape[0], size[1] / shape[1])
    cut_off = max(size[0] / scale - shape[0], size[1] / scale - shape[1])
    places = [0.5] if crops == 1 or cut_off < 1 else [index / (crops - 1) for index in range(crops)]
    return [
        [Crop(shape=shape, place=place, mirrored=mirrored) for mirrored in ((False, True) if mirror else (False,))]
        for place in places
    ]
