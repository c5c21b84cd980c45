"""DreamBench's figures (Ruiz et al., "DreamBooth", 2023, sections 4.1 and 4.3), from features of images and prompts.

| figure | function | features | range | better |
|---|---|---|---|---|
| DINO, CLIP-I | `subject_fidelity` | DINO, CLIP | [-1, 1] | higher |
| CLIP-T | `prompt_fidelity` | CLIP | [-1, 1] | higher |
| PRES | `prior_preservation` | DINO | [-1, 1] | lower |
| DIV | `diversity` | LPIPS | at least 0 | higher |

In the paper: DINO .696 (real images .774), CLIP-I .812 (.885), CLIP-T .305 (Imagen); PRES .493 with prior preservation
and .664 without, DIV .391 and .371.

Features are (N, D), of any length; each row is normalised first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TypeAlias

import numpy as np

from mflux_vae.errors import ImageError
from mflux_vae.metrics import image as image_metrics
from mflux_vae.metrics.lpips import LPIPS
from mflux_vae_train.evaluation.features import normalized

Distance: TypeAlias = Callable[[np.ndarray, np.ndarray], float]
"""Distance of two images, uint8 (H, W, 3) of one size."""


def subject_fidelity(drawn: np.ndarray, real: np.ndarray) -> float:
    """Mean cosine of all pairs of a drawn and a real image of one subject: DINO or CLIP-I by the features.

    Args:
        drawn, real: (N, D) and (M, D), not empty.

    Raises:
        ImageError: shapes do not fit, or features are not finite; also in the functions below.
    """
    drawn, real = _checked(drawn), _checked(real)
    if drawn.shape[1] != real.shape[1]:
        raise _misfit(drawn, real)
    return float(drawn.mean(axis=0) @ real.mean(axis=0))


def prompt_fidelity(images: np.ndarray, prompts: np.ndarray) -> float:
    """CLIP-T: mean cosine of each image with its prompt.

    Args:
        images, prompts: (N, D), row by row.
    """
    images, prompts = _checked(images), _checked(prompts)
    if images.shape != prompts.shape:
        raise _misfit(images, prompts)
    return float((images * prompts).sum(axis=1).mean())


def prior_preservation(class_drawn: np.ndarray, real: np.ndarray) -> float:
    """PRES: mean DINO cosine of images drawn for the class alone to the subject's real ones; lower is better.

    High if the model draws the subject whatever member of its class is asked for.
    """
    return subject_fidelity(class_drawn, real)


def diversity(groups: Sequence[Sequence[np.ndarray]], distance: Distance) -> float:
    """DIV: mean distance of all pairs within a group.

    Args:
        groups: images of one subject and prompt each, uint8 (H, W, 3) of one size. Groups of one image do not count.
        distance: such as `lpips_distance(network)`.

    Raises:
        ImageError: no group has two images.
    """
    found = [distance(one, other) for group in groups for one, other in combinations(group, 2)]
    if not found:
        raise ImageError("diversity needs two images of one prompt; draw more for each")
    return float(np.mean(found))


def lpips_distance(network: LPIPS) -> Distance:
    """LPIPS of two images, by a network of `LPIPS.from_files`."""

    def distance(image: np.ndarray, other: np.ndarray) -> float:
        one, two = (picture.transpose(2, 0, 1)[None] for picture in (image, other))
        return float(image_metrics.lpips(one, two, network))

    return distance


def _checked(features: np.ndarray) -> np.ndarray:
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        finite = "" if np.isfinite(values).all() else " with infinite or NaN values"
        raise ImageError(f"features are {values.shape}{finite}; expected (N, D) with at least one row")
    return normalized(values)


def _misfit(first: np.ndarray, second: np.ndarray) -> ImageError:
    return ImageError(f"features of {first.shape} and {second.shape} do not belong together")
