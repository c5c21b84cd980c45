"""Curves for charts: thinning, smoothing, scales with round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_POINTS = 400
"""Number of points that a curve is thinned to, about the width of a chart on a phone."""

LOG_SCALE_RATIO = 30.0
"""Ratio of the largest to the smallest value above which a scale is logarithmic by default."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One number over updates.

    Attributes:
        updates: increasing; updates without a measurement are left out.
        values: one for each update; values that are not finite are not drawn.
        smooth: whether to draw an average.
        faint: whether to draw the values beside their average.
    """

    name: str
    updates: Sequence[int]
    values: Sequence[float]
    smooth: bool = True
    faint: bool = True


@dataclass(frozen=True, kw_only=True)
class Points:
    """A thinned curve of at most `MAX_POINTS` points; each represents a group of updates.

    Attributes:
        updates: last update of each group.
        values: mean value.
        lowest, highest: extreme values.
        smoothed: average up to the update; the values themselves without smoothing.
    """

    updates: np.ndarray
    values: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    smoothed: np.ndarray


def smoothed(values: np.ndarray) -> np.ndarray:
    """Bias-corrected exponential average over about a twentieth of the run."""
    keep = 1 - 1 / max(2.0, len(values) / 20)
    total, weight, averaged = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averaged.append(total / weight)
    return np.array(averaged)


def points(curve: Curve) -> Points:
    """Thin a curve: each group of neighbouring updates becomes one point."""
    updates, values = np.asarray(curve.updates, int), np.asarray(curve.values, float)
    finite = np.isfinite(values)
    updates, values = updates[finite], values[finite]
    average = smoothed(values) if curve.smooth else values
    count = len(values)
    ends = np.linspace(0, count, min(count, MAX_POINTS) + 1).round().astype(int)
    groups = [slice(first, end) for first, end in pairwise(ends)]
    return Points(
        updates=np.array([updates[group][-1] for group in groups], int),
        values=np.array([values[group].mean() for group in groups]),
        lowest=np.array([values[group].min() for group in groups]),
        highest=np.array([values[group].max() for group in groups]),
        smoothed=np.array([average[group][-1] for group in groups]),
    )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Maps numbers to [0, 1], from the bottom or left.

    Attributes:
        low, high: mapped to 0 and 1.
        ticks: round numbers between them.
    """

    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def at(self, values: np.ndarray | float) -> np.ndarray:
        """Positions, clipped to [-0.5, 1.5]."""
        given = np.asarray(values, float)
        low, high = self.low, self.high
        if self.logarithmic:
            given, low, high = np.log(np.maximum(given, 1e-300)), math.log(low), math.log(high)
        return np.clip((given - low) / (high - low), -0.5, 1.5)


def scale(drawn: Sequence[Points], *, also: Sequence[float] = (), logarithmic: bool | None = None) -> Scale:
    """A scale for the 1st to 99th percentile, so that single outliers do not compress the curves.

    Args:
        also: more values to include.
        logarithmic: None decides by the range of the values.
    """
    seen = [np.concatenate([one.lowest, one.highest, one.smoothed]) for one in drawn if len(one.values)]
    numbers = np.concatenate([*seen, np.asarray(also, float)]) if seen or also else np.array([0.0, 1.0])
    low, high = np.percentile(numbers, [1, 99])
    for one in drawn:  # averages are always included
        if len(one.smoothed):
            low, high = min(low, one.smoothed.min()), max(high, one.smoothed.max())
    low, high = min([low, *also]), max([high, *also])
    positive = numbers[numbers > 0]
    if logarithmic is None:
        logarithmic = len(positive) == len(numbers) and high / low > LOG_SCALE_RATIO
    if logarithmic and len(positive):
        low = max(low, positive.min())
        return _decades(low / 1.15, max(high, low) * 1.15)
    if 0 <= low < 0.45 * high:
        low = 0.0
    if high - low < 1e-12 * max(abs(high), 1e-300) or high == low:
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0.0, 1.0)
    margin = 0.06 * (high - low)
    low, high = (low if low == 0 else low - margin), high + margin
    return Scale(low=low, high=high, ticks=round_numbers(low, high))


def round_numbers(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between `low` and `high`, about `count`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * index, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def _decades(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 5)
    factors = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return Scale(low=low, high=high, ticks=[tick for tick in ticks if low <= tick <= high], logarithmic=True)
