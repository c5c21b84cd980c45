"""Charts: round ticks, scales without outliers, paths at the positions of the values."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mflux_vae_train.monitoring.report.charts import SIZE, Chart, draw, format_number
from mflux_vae_train.monitoring.report.curves import MAX_POINTS, Curve, points, round_numbers, scale, smoothed
from tests.helpers.html import Page


def curve(values, name="loss", **options) -> Curve:
    return Curve(name=name, updates=range(1, len(values) + 1), values=list(values), **options)


@settings(deadline=None, derandomize=True)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_inside(low: float, width: float) -> None:
    ticks = round_numbers(low, low + width)
    assert 1 <= len(ticks) <= 11
    slack = 1e-6 * (abs(low) + width)
    assert all(low - slack <= tick <= low + width + slack for tick in ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[:1], rtol=1e-5, atol=slack)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (0.12345, "0.123"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (200, "200"), (1234, "1234"),
     (123456, "123,456"), (-0.25, "-0.25"), (2e9, "2e9"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


def test_smoothing_keeps_constants_and_follows_trends() -> None:
    np.testing.assert_allclose(smoothed(np.full(100, 3.0)), 3)
    falling = smoothed(np.linspace(1, 0, 100))
    assert (np.diff(falling) < 0).all() and falling[-1] < 0.1


def test_thinning_keeps_extremes_means_and_the_end() -> None:
    values = np.random.default_rng(0).normal(size=10 * MAX_POINTS + 7)
    values[1234] = 50.0
    thinned = points(curve(values))
    assert len(thinned.updates) == MAX_POINTS and thinned.updates[-1] == len(values)
    assert thinned.highest.max() == 50.0 and thinned.lowest.min() == values.min()
    assert thinned.values.mean() == pytest.approx(values.mean(), abs=0.01)


def test_values_that_are_not_finite_are_left_out() -> None:
    assert points(curve([1.0, float("nan"), 3.0, float("inf")])).updates.tolist() == [1, 3]


def test_one_outlier_does_not_compress_the_scale() -> None:
    usual = np.abs(np.random.default_rng(0).normal(1, 0.1, 400))
    shown = scale([points(curve(usual))], logarithmic=False)
    with_one = scale([points(curve([*usual, 1000.0]))], logarithmic=False)
    assert shown.high < 2 and with_one.high < 100  # the average is shown, the outlier lies above


def test_a_scale_is_logarithmic_for_a_wide_range() -> None:
    assert scale([points(curve(np.logspace(-6, 0, 50), smooth=False))]).logarithmic
    assert not scale([points(curve(np.linspace(1, 2, 50)))]).logarithmic
    assert not scale([points(curve(np.linspace(-1, 100, 50)))]).logarithmic


@pytest.mark.parametrize("values", [[], [0.0], [3.0], [0.0] * 9, [2.0, 2.0], [-1.0, -1.0], [1e-30, 1.0]])
def test_odd_curves_are_drawn(values: list[float]) -> None:
    html = draw(Chart(title="t", curves=[curve(values)]), total=len(values))
    assert "nan" not in html and "inf" not in html.replace("in font", "")
    Page(html)


def test_paths_have_the_positions_of_the_values() -> None:
    values = [0.0, 1.0, 4.0, 2.0]
    html = draw(Chart(title="a < b", curves=[curve(values, name="<x>", smooth=False)], line=(3.0, "limit")), total=4)
    page = Page(html)
    (path,) = [path["d"] for path in page.of("path") if "average" in path["class"]]
    places = np.array([[float(one) for one in pair.split()] for pair in re.split("[ML]", path)[1:]])
    np.testing.assert_allclose(places[:, 0], np.array([1, 2, 3, 4]) / 4 * SIZE, atol=0.1)
    heights = SIZE - places[:, 1]
    np.testing.assert_allclose(heights / heights[2], np.array(values) / 4, atol=1e-3)  # from zero
    labels = {text: each for each, text in spans(html)}
    np.testing.assert_allclose(labels["4"] * SIZE / 100, heights[2], atol=0.2)  # equal to the tick of the axis
    (data,) = [json.loads(text) for tag, text in page.texts if tag == "script"]
    assert data[0]["values"] == values and data[0]["name"] == "<x>" and "<x>" not in html


def spans(html: str) -> list[tuple[float, str]]:
    return [(float(place), text) for place, text in re.findall(r'<span style="bottom:([\d.]+)%">([^<]+)</span>', html)]
