"""Sample images of a prompt: class images, previews, and those of ``mflux-dreambooth draw``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mflux_vae.errors import RunError
from mflux_vae.images import to_pictures
from mflux_vae_train.dreambooth.data.encoding import images_per_batch
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline

Size = tuple[int, int]
"""Height and width in pixels."""


def sample_images(
    pipeline: DiffusionPipeline,
    conditioning: Conditioning,
    keys: mx.array,
    names: Sequence[str],
    *,
    size: Size,
    guidance: float,
    steps: int,
) -> list[np.ndarray]:
    """Images (uint8), one per key.

    Args:
        conditioning: of one prompt, one row; or of a prompt for each key.
        names: of the images, for errors.

    Raises:
        RunError: an image has NaN or infinite values.
    """
    count = keys.shape[0]
    rows = {name: mx.repeat(array, count // array.shape[0], axis=0) for name, array in conditioning.items()}
    pixels = checks.sample(pipeline, rows, size=size, steps=steps, guidance=guidance, key=keys)
    # NumPy has no bfloat16, in which a host's pipeline may sample
    values = np.array(pixels.astype(mx.float32))
    for name, image in zip(names, values, strict=True):
        if not np.isfinite(image).all():
            raise RunError(f"{name} has NaN or infinite values: weights are not finite, or the device failed")
    return list(to_pictures(values))


def preview_batches(count: int, size: Size, processes: int = 1) -> list[range]:
    """Which of the images 0 to `count` - 1 of a prompt are sampled together, by so many processes.

    Rounding may depend on the batch.
    """
    step = min(images_per_batch(math.isqrt(size[0] * size[1])), -(-count // processes))
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def is_one_colour(image: np.ndarray) -> bool:
    """Whether an image is all one colour, as those of a diverged adapter or a failed device."""
    return bool((image == image[:1, :1]).all())
