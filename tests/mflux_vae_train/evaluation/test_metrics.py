"""DreamBench's figures on features with known answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import ImageError
from mflux_vae_train.evaluation import metrics


def directions(*degrees: float) -> np.ndarray:
    """Features in the plane, of various lengths."""
    radians = np.radians(degrees)
    lengths = np.arange(1, len(degrees) + 1)[:, None]
    return lengths * np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_subject_fidelity_is_the_mean_cosine_to_the_real_images() -> None:
    """Not the cosine to their mean, nor weighted by lengths."""
    found = metrics.subject_fidelity(directions(0, 90, 225), directions(30, 90))
    cosines = np.cos(np.radians([[30, 90], [60, 0], [195, 135]]))
    np.testing.assert_allclose(found, cosines.mean(axis=1), atol=1e-12)


def test_fidelity_of_equal_and_opposite_features() -> None:
    np.testing.assert_allclose(metrics.subject_fidelity(directions(45, 225), directions(45, 45)), [1, -1])


def test_prompt_fidelity_takes_rows_in_pairs() -> None:
    images, prompts = directions(0, 90), directions(60, 90)
    np.testing.assert_allclose(metrics.prompt_fidelity(images, prompts), [0.5, 1])
    np.testing.assert_allclose(metrics.prompt_fidelity(images, prompts[::-1]), [0, math.sqrt(3) / 2], atol=1e-12)


def test_lpips_gets_pixels() -> None:
    """A network that takes the mean absolute difference of pixels in [-1, 1]."""
    network: Any = lambda x, y: mx.abs(x - y).mean(axis=(1, 2, 3))  # noqa: E731
    images = [np.full((20, 16, 3), level, np.uint8) for level in (0, 255, 51)]
    expected = [[0, 2, 0.4], [2, 0, 1.6], [0.4, 1.6, 0]]
    np.testing.assert_allclose(metrics.lpips_distances(images, network), expected, atol=1e-4)


@pytest.mark.parametrize(
    "compute",
    [
        lambda: metrics.subject_fidelity(np.zeros((0, 2)), directions(0)),
        lambda: metrics.subject_fidelity(np.ones((1, 3)), directions(0)),
        lambda: metrics.subject_fidelity(np.ones(2), directions(0)),
        lambda: metrics.prompt_fidelity(directions(0, 1), directions(0)),
        lambda: metrics.prompt_fidelity(directions(math.nan), directions(0)),
    ],
)
def test_features_that_do_not_fit(compute: Callable[[], np.ndarray]) -> None:
    with pytest.raises(ImageError, match="features"):
        compute()
