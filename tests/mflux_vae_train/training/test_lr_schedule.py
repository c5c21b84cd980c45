"""The learning rate at the start, the peak and the end, in optimizer updates."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from mflux_vae_train.training.lr_schedule import (
    POLYNOMIAL,
    POLYNOMIAL_END,
    RESTARTS,
    SHAPES,
    learning_rate,
    schedule_warnings,
)


@pytest.mark.parametrize("shape", SHAPES)
def test_start_peak_and_end(shape: str) -> None:
    rate = learning_rate(peak=2e-4, total=800, warmup=50, shape=shape)
    assert 0 < rate(0) == pytest.approx(2e-4 / 51, rel=1e-6)
    assert rate(25) == pytest.approx(2e-4 * 26 / 51, rel=1e-6)
    assert rate(49) < rate(50) == pytest.approx(2e-4, rel=1e-6)
    flat = shape.startswith("constant")
    assert rate(50 + 375) == pytest.approx(2e-4 if flat else 1e-4, rel=1e-6)
    end = 2e-4 if flat else 0.0
    assert rate(800) == pytest.approx(end, abs=1e-12)
    assert rate(900) == pytest.approx(end, abs=1e-12)
    assert max(rate(update) for update in range(801)) == pytest.approx(2e-4, rel=1e-6)


def test_without_warm_up_the_first_update_has_the_peak_rate() -> None:
    assert learning_rate(peak=1.0, total=10, shape="cosine")(0) == pytest.approx(1.0)


def test_a_run_of_one_update_learns() -> None:
    assert learning_rate(peak=1.0, total=1, warmup=50, shape="cosine")(0) == pytest.approx(1.0)


def test_a_warm_up_longer_than_the_run_is_shortened_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rate = learning_rate(peak=1.0, total=40, warmup=50, shape="cosine")
    assert "shortened" in caplog.text
    assert rate(4) == pytest.approx(1.0)
    assert rate(40) == pytest.approx(0.0, abs=1e-12)


def test_a_warm_up_of_most_of_the_run_gets_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rate = learning_rate(peak=1.0, total=150, warmup=100, shape="cosine")
    assert "100 of 150" in caplog.text
    assert rate(100) == pytest.approx(1.0)


def test_step_decay_equals_torchs_for_any_length_of_the_run() -> None:
    for total in (40, 4000):
        rate = learning_rate(peak=1.0, total=total, warmup=2, shape="step_decay", gamma=0.5, step_size=10)
        assert [rate(update) for update in (2, 9, 10, 19, 20, 39)] == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.125])
        assert rate(0) == pytest.approx(1 / 3)


def test_cosine_restarts_and_polynomial() -> None:
    rate = learning_rate(peak=1.0, total=100, shape=RESTARTS, cycles=4)
    assert [rate(update) for update in (0, 25, 50, 75)] == pytest.approx([1.0] * 4)
    assert rate(24) < 0.01 and rate(100) == 0
    rate = learning_rate(peak=1e-2, total=100, shape=POLYNOMIAL, power=2.0)
    assert [rate(update) for update in (0, 50, 100)] == pytest.approx([1e-2, 0.25e-2, POLYNOMIAL_END], rel=1e-3)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"total": 40, "warmup": 50}, "shortened to 4"),
        ({"total": 40, "warmup": 30}, "30 of 40"),
        ({"total": 40, "shape": RESTARTS, "cycles": 300}, "at most 10"),
        ({"total": 40, "warmup": 20, "shape": RESTARTS, "cycles": 6}, "at most 5"),
        ({"total": 40, "warmup": 20, "shape": RESTARTS, "cycles": 5}, None),
        ({"total": 40, "cycles": 300}, None),
        ({"total": 1, "shape": RESTARTS, "cycles": 1}, None),
    ],
)
def test_what_does_not_fit_the_length_of_the_run_is_a_warning(given: dict[str, Any], word: str | None) -> None:
    lines = schedule_warnings(**given)
    assert len(lines) == (word is not None) and (word is None or word in lines[0])
