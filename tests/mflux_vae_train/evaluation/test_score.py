"""Standard errors agree with the scatter of repeated measurements."""

from __future__ import annotations

import numpy as np
import pytest

from mflux_vae_train.evaluation import score
from mflux_vae_train.evaluation.score import Score

RNG = np.random.default_rng(0)


def test_error_of_a_mean_is_its_scatter() -> None:
    scores = [score.mean(row) for row in RNG.normal(3, 2, (500, 25))]
    assert np.mean([one.error for one in scores]) == pytest.approx(np.std([one.value for one in scores]), rel=0.1)
    assert score.mean([1.0]) == Score(value=1.0, error=0.0)


def test_differences_of_prompts_are_no_error() -> None:
    groups = np.repeat(np.arange(5), 4)
    scores = [score.mean(10 * groups + row, groups) for row in RNG.normal(0, 1, (500, 20))]
    assert np.mean([one.error for one in scores]) == pytest.approx(np.std([one.value for one in scores]), rel=0.1)
    single = score.mean(np.arange(5.0), np.arange(5))  # one image of each prompt tells nothing about chance
    assert single == score.mean(np.arange(5.0))


def test_share_of_all_has_an_error() -> None:
    assert score.share([True, True, False, False]).value == 0.5
    assert score.share([True] * 32).value == 1.0 and 0.01 < score.share([True] * 32).error < 0.06


def test_error_of_pairs_is_their_scatter() -> None:
    points = RNG.normal(0, 1, (1000, 30, 1))
    scores = [score.pair_mean(np.abs(row - row.T)) for row in points]
    assert np.mean([one.value for one in scores]) == pytest.approx(2 / np.sqrt(np.pi), rel=0.05)
    assert np.mean([one.error for one in scores]) == pytest.approx(np.std([one.value for one in scores]), rel=0.15)


def test_average_of_independent_scores() -> None:
    assert score.average([Score(value=1, error=3), Score(value=3, error=4)]) == Score(value=2, error=2.5)
