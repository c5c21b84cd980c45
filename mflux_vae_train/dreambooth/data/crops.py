"""Crops of an image: the shape that it is trained in, the offset of the crop, and mirroring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from mflux_vae.errors import SettingsError
from mflux_vae.images import covered
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.pipelines.capabilities import CropGeometry
from mflux_vae_train.pipelines.protocol import Recommended

Shape: TypeAlias = "tuple[int, int]"
"""Height and width in pixels."""

ASPECTS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)
"""Height / width of the shapes of ``--use_aspect_ratio_buckets``, as in diffusers' scripts."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """
    Attributes:
        shape: height and width after cropping and resizing.
        offset: position of the crop along the longer side, in [0, 1]; see `images.covered`.
        mirrored: whether the crop is flipped horizontally.
    """

    shape: Shape
    offset: float = 0.5
    mirrored: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, C) -> (*shape, C)."""
        return self.mirror(covered(image, self.shape, place=self.offset))

    def mirror(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (*shape, C), flipped if the crop is mirrored."""
        return np.ascontiguousarray(pixels[:, ::-1]) if self.mirrored else pixels

    def geometry(self, size: Shape) -> CropGeometry:
        """Of this crop of an image with this height and width."""
        scale = min(size[0] / self.shape[0], size[1] / self.shape[1])
        place = self.offset, 1 - self.offset if self.mirrored else self.offset
        top, left = (
            round((side / scale - cropped) * share)
            for side, cropped, share in zip(size, self.shape, place, strict=True)
        )
        return CropGeometry(original=(size[0], size[1]), corner=(top, left), target=self.shape)

    @property
    def unmirrored(self) -> Crop:
        return replace(self, mirrored=False)


def training_resolution(settings: DreamBoothSettings, recommended: Recommended) -> int:
    """Side of a square training image in pixels.

    Raises:
        SettingsError: the pipeline does not support it.
    """
    resolution, multiple = settings.resolution or recommended.resolution, recommended.size_multiple
    if resolution % multiple:
        below, above = resolution // multiple * multiple, -(-resolution // multiple) * multiple
        near = f"{below} or {above}" if below else f"{above}"
        raise SettingsError(f"--resolution is {resolution}; a multiple of {multiple} is needed, such as {near}")
    return resolution


def bucket_shapes(settings: DreamBoothSettings, *, resolution: int, multiple: int) -> list[Shape]:
    """The shapes that images are trained in.

    Args:
        multiple: sides are multiples of this many pixels.

    Raises:
        SettingsError: ``--aspect_ratio_buckets`` cannot be parsed, or a side is not such a multiple.
    """
    if settings.aspect_ratio_buckets is not None:
        return _parse_buckets(settings.aspect_ratio_buckets, multiple)
    if not settings.use_aspect_ratio_buckets:
        return [(resolution, resolution)]
    sides = [(resolution * math.sqrt(aspect), resolution / math.sqrt(aspect)) for aspect in ASPECTS]
    rounded = [tuple(max(1, round(side / multiple)) * multiple for side in pair) for pair in sides]
    return list(dict.fromkeys((height, width) for height, width in rounded))


def _parse_buckets(text: str, multiple: int) -> list[Shape]:
    shapes = []
    for pair in text.split(";"):
        sides = pair.split(",")
        if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
            raise SettingsError(f"--aspect_ratio_buckets: {pair.strip()!r} is not 'height,width'")
        height, width = (int(side) for side in sides)
        if not height or not width or height % multiple or width % multiple:
            raise SettingsError(f"--aspect_ratio_buckets: {height},{width}: sides must be multiples of {multiple}")
        shapes.append((height, width))
    return list(dict.fromkeys(shapes))


def nearest_shape(size: Shape, shapes: Sequence[Shape]) -> Shape:
    """The shape whose aspect ratio is nearest to that of an image; the first of equals."""
    return min(shapes, key=lambda shape: abs(math.log(size[0] / size[1]) - math.log(shape[0] / shape[1])))


def crops(size: Shape, shape: Shape, *, count: int, mirror: bool) -> list[list[Crop]]:
    """The crops that samples of an image are drawn from: a row per offset; in it the plain and the mirrored crop.

    Args:
        size: height and width of the image.
        count: number of offsets, evenly spaced from one end to the other; 1 for the centre. An image that is not
            cut has one offset.
        mirror: whether rows contain a mirrored crop.
    """
    scale = min(size[0] / shape[0], size[1] / shape[1])
    excess = max(size[0] / scale - shape[0], size[1] / scale - shape[1])
    offsets = [0.5] if count == 1 or excess < 1 else [index / (count - 1) for index in range(count)]
    return [
        [Crop(shape=shape, offset=offset, mirrored=mirrored) for mirrored in ((False, True) if mirror else (False,))]
        for offset in offsets
    ]
