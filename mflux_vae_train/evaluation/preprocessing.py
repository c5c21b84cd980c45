"""Images -> pixels of DINO and CLIP: resize the short side, crop the centre, normalise.

Equal to the bit to transformers' Pillow processors (`CLIPImageProcessorPil`, and `ViTImageProcessorPil` with
``size={"shortest_edge": 256}``, a centre crop and the bicubic filter): Pillow's bicubic filter, which antialiases, a
long side rounded down, a crop from ``(side - crop) // 2``. Other programs differ:

- torchvision's `Resize` and `CenterCrop` on Pillow images, which DINO's and OpenAI's programs use: the crop starts one
  pixel later where the side exceeds it by 3, 7, 11, ... pixels.
- transformers' default processors resize tensors by torchvision.
- facebook/dino-vits16's preprocessor_config.json squeezes images to 224 x 224 by a bilinear filter, without a crop.
  DINO's evaluation does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mflux_vae.images import load_images

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of RGB in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """
    Attributes:
        short_side: length of the short side after the resize.
        crop: side of the result, at most `short_side`.
        statistics: mean and standard deviation of each channel.
    """

    short_side: int
    crop: int
    statistics: tuple[tuple[float, ...], tuple[float, ...]]

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images uint8 (H, W, 3) of any sizes -> float32 (N, crop, crop, 3).

        Raises:
            ImageError: an image has another shape or range, see `mflux_vae.images.load_images`.
        """
        mean, deviation = (np.array(values, np.float32) for values in self.statistics)
        squares = np.stack([self._square(image) for image in load_images(list(images))])
        return ((squares.astype(np.float64) * (1 / 255)).astype(np.float32) - mean) / deviation

    def _square(self, image: np.ndarray) -> np.ndarray:
        """Resize and crop."""
        short = min(image.shape[:2])
        height, width = (self.short_side * side // short for side in image.shape[:2])
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        return np.array(resized)[top : top + self.crop, left : left + self.crop]
