"""DreamBench's figures on features with known answers."""

from __future__ import annotations

import math
from collections.abc import Callable

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


def test_fidelity_is_the_mean_cosine_of_all_pairs() -> None:
    """Angles of 30, 60, 90 and 0 degrees: not the cosine of the means."""
    expected = (math.sqrt(3) / 2 + 0.5 + 0 + 1) / 4
    assert metrics.subject_fidelity(directions(0, 60), directions(30, 60))  # symmetric below
    found = metrics.subject_fidelity(directions(0, 90), directions(30, 90))
    assert found == pytest.approx((math.sqrt(3) / 2 + 0 + 0.5 + 1) / 4)
    assert metrics.subject_fidelity(directions(30, 90), directions(0, 90)) == pytest.approx(found)
    assert metrics.prior_preservation(directions(0, 90), directions(30, 90)) == found == pytest.approx(expected)


def test_fidelity_of_equal_and_opposite_features() -> None:
    assert metrics.subject_fidelity(directions(45), directions(45, 45)) == pytest.approx(1)
    assert metrics.subject_fidelity(directions(45), directions(225)) == pytest.approx(-1)


def test_prompt_fidelity_takes_rows_in_pairs() -> None:
    images, prompts = directions(0, 90), directions(60, 90)
    assert metrics.prompt_fidelity(images, prompts) == pytest.approx((0.5 + 1) / 2)
    assert metrics.prompt_fidelity(images, prompts[::-1]) == pytest.approx((0 + math.cos(math.radians(30))) / 2)


def test_diversity_is_the_mean_over_pairs_of_one_prompt() -> None:
    groups = [[np.full((1, 1, 3), level, np.uint8) for level in levels] for levels in ((0, 1, 3), (10,), (5, 5))]
    found = metrics.diversity(groups, lambda one, other: abs(float(one[0, 0, 0]) - float(other[0, 0, 0])))
    assert found == pytest.approx((1 + 3 + 2 + 0) / 4)


def test_lpips_gets_pixels() -> None:
    """A network that takes the mean absolute difference of pixels in [-1, 1]."""
    images = [np.full((20, 16, 3), level, np.uint8) for level in (0, 255)]
    distance = metrics.lpips_distance(lambda x, y: mx.abs(x - y).mean(axis=(1, 2, 3)))
    assert metrics.diversity([images], distance) == pytest.approx(2)


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
def test_features_that_do_not_fit(compute: Callable[[], float]) -> None:
    with pytest.raises(ImageError, match="features"):
        compute()


def test_diversity_needs_pairs() -> None:
    with pytest.raises(ImageError, match="two images"):
        metrics.diversity([[np.zeros((1, 1, 3), np.uint8)]], lambda one, other: 0.0)
