"""Curves over updates -> what a chart draws: thinned, smoothed, on a scale with round numbers. No HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MOST_POINTS = 400
"""Points that a curve is thinned to, about as many as a chart is wide on a telephone."""

WIDE = 30.0
"""Ratio of largest to smallest value from which a scale is logarithmic by itself."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One number over updates.

    Attributes:
        updates: rising; where nothing was measured, an update is left out.
        values: one for each; not finite ones are left out of the drawing.
        smooth: whether an average is drawn, too.
        faint: whether the values themselves are, beside their average.
    """

    name: str
    updates: Sequence[int]
    values: Sequence[float]
    smooth: bool = True
    faint: bool = True


@dataclass(frozen=True, kw_only=True)
class Points:
    """What is drawn of a curve, at most `MOST_POINTS`.

    Attributes:
        updates: last one of each point's updates.
        values: their mean.
        lowest, highest: of them.
        smoothed: the average up to there; the values themselves where nothing is to be smoothed.
    """

    updates: np.ndarray
    values: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    smoothed: np.ndarray


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential average over about a twentieth of the run, started without bias."""
    keep = 1 - 1 / max(2.0, len(values) / 20)
    total, weight, averaged = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averaged.append(total / weight)
    return np.array(averaged)


def points(curve: Curve) -> Points:
    """Groups of neighbouring updates become a point each."""
    updates, values = np.asarray(curve.updates, int), np.asarray(curve.values, float)
    finite = np.isfinite(values)
    updates, values = updates[finite], values[finite]
    average = smoothed(values) if curve.smooth else values
    count = len(values)
    ends = np.unique(np.linspace(0, count, min(count, MOST_POINTS) + 1).round().astype(int))
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
    """Numbers -> 0 (bottom, left) to 1.

    Attributes:
        low, high: at 0 and 1.
        ticks: round numbers between them.
    """

    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def at(self, values: np.ndarray | float) -> np.ndarray:
        """Places; what lies outside is moved to a little outside of 0 or 1."""
        given = np.asarray(values, float)
        low, high = self.low, self.high
        if self.logarithmic:
            given, low, high = np.log(np.maximum(given, 1e-300)), math.log(low), math.log(high)
        return np.clip((given - low) / (high - low), -0.5, 1.5)


def scale(drawn: Sequence[Points], *, also: Sequence[float] = (), logarithmic: bool | None = None) -> Scale:
    """A scale on which single outliers do not squeeze all else.

    Args:
        also: numbers that must be on it.
        logarithmic: None decides by how far the values are apart.
    """
    seen = [np.concatenate([one.lowest, one.highest, one.smoothed]) for one in drawn if len(one.values)]
    numbers = np.concatenate([*seen, np.asarray(also, float)]) if seen or also else np.array([0.0, 1.0])
    low, high = np.percentile(numbers, [1, 99])
    for one in drawn:  # the averages are on it in any case
        if len(one.smoothed):
            low, high = min(low, one.smoothed.min()), max(high, one.smoothed.max())
    low, high = min([low, *also]), max([high, *also])
    positive = numbers[numbers > 0]
    if logarithmic is None:
        logarithmic = len(positive) == len(numbers) and high / low > WIDE
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


def round_numbers(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about as many as wanted."""
    rough = (high - low) / wanted
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
