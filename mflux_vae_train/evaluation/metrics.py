"""DreamBench's figures (Ruiz et al., "DreamBooth", 2023, sections 4.1 and 4.3), from features of images and prompts.

| figure | mean of | features | range | better |
|---|---|---|---|---|
| DINO, CLIP-I | `subject_fidelity` of images of the subject | DINO, CLIP | [-1, 1] | higher |
| CLIP-T | `prompt_fidelity` | CLIP | [-1, 1] | higher |
| PRES | `subject_fidelity` of images of the class: how far it has become the subject | DINO | [-1, 1] | lower |
| DIV | `lpips_distances` of two images of one subject and prompt | LPIPS | at least 0 | higher |

In the paper: DINO .696 (real images .774), CLIP-I .812 (.885), CLIP-T .305 (Imagen); PRES .493 with prior preservation
and .664 without, DIV .391 and .371.

Features are (N, D), of any length; each row is normalised first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from mflux_vae.errors import ImageError
from mflux_vae.metrics import image as image_metrics
from mflux_vae.metrics.lpips import LPIPS
from mflux_vae_train.evaluation.features import normalized


def subject_fidelity(drawn: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean cosine of each drawn image to all real ones of one subject: (N,).

    Args:
        drawn, real: (N, D) and (M, D), not empty.

    Raises:
        ImageError: shapes do not fit, or features are not finite.
    """
    drawn, real = _checked(drawn), _checked(real)
    if drawn.shape[1] != real.shape[1]:
        raise _misfit(drawn, real)
    return drawn @ real.mean(axis=0)


def prompt_fidelity(images: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Cosine of each image with its prompt: (N,).

    Args:
        images, prompts: (N, D), row by row.

    Raises:
        ImageError: as `subject_fidelity`.
    """
    images, prompts = _checked(images), _checked(prompts)
    if images.shape != prompts.shape:
        raise _misfit(images, prompts)
    return (images * prompts).sum(axis=1)


def lpips_distances(images: Sequence[np.ndarray], network: LPIPS) -> np.ndarray:
    """LPIPS of every two images, uint8 (H, W, 3) of one size: (N, N), symmetric."""
    distances = np.zeros((len(images), len(images)), np.float32)
    channels_first = [image.transpose(2, 0, 1)[None] for image in images]
    for i, j in combinations(range(len(images)), 2):
        distances[i, j] = distances[j, i] = image_metrics.lpips(channels_first[i], channels_first[j], network).item()
    return distances


def _checked(features: np.ndarray) -> np.ndarray:
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        finite = "" if np.isfinite(values).all() else " with infinite or NaN values"
        raise ImageError(f"features are {values.shape}{finite}; expected (N, D) with at least one row")
    return normalized(values)


def _misfit(first: np.ndarray, second: np.ndarray) -> ImageError:
    return ImageError(f"features of {first.shape} and {second.shape} do not belong together")
