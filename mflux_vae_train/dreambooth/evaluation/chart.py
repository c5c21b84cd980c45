"""fidelity.png: subject fidelity over prompt fidelity, a point for each checkpoint and scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mflux_vae.images import save_image
from mflux_vae_train.dreambooth.evaluation.recommend import Row
from mflux_vae_train.dreambooth.evaluation.result import Evaluation
from mflux_vae_train.evaluation.evaluator import Measure
from mflux_vae_train.monitoring.report.charts import format_number
from mflux_vae_train.monitoring.report.curves import Scale, round_numbers

_WIDTH, _HEIGHT, _FONT = 1920, 1280, 32
_LEFT, _TOP, _RIGHT, _BOTTOM = 150, 60, 1880, 1150
"""Axes in pixels, before the image is halved."""

_COLOURS = ("#1f77b4", "#e0701a", "#2a9d4a", "#8c4fb0", "#b8383b")
"""Of the scales."""

_GREY, _GRID, _RADIUS = "#777777", "#e4e4e4", 11
_PLACES = tuple((right, down) for down in (-1.5, 1.5, -3.5, 3.5) for right in (1, -1))
"""Where labels may stand, in units of half a line from their point."""


def write_chart(evaluation: Evaluation, path: Path) -> None:
    """Draw all rows with error bars. Lines follow one scale through training; a ring marks the recommended row."""
    measures = evaluation.measures
    across, up = (next(one for one in measures if one.role == role) for role in ("kept", "gained"))
    rows, chosen = [evaluation.base, *evaluation.rows], evaluation.recommendation().row
    x, y = (_scale(rows, measure) for measure in (across, up))
    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_FONT)

    def place(right: float, high: float) -> tuple[float, float]:
        return _LEFT + float(x.at(right)) * (_RIGHT - _LEFT), _BOTTOM - float(y.at(high)) * (_BOTTOM - _TOP)

    def point(row: Row) -> tuple[float, float]:
        return place(row.scores[across.name].value, row.scores[up.name].value)

    for tick in y.ticks:
        draw.line([place(x.low, tick), place(x.high, tick)], fill=_GRID, width=2)
        draw.text((_LEFT - 12, place(x.low, tick)[1]), format_number(tick), fill="black", font=font, anchor="rm")
    for tick in x.ticks:
        draw.line([place(tick, y.low), place(tick, y.high)], fill=_GRID, width=2)
        draw.text((place(tick, y.low)[0], _BOTTOM + 12), format_number(tick), fill="black", font=font, anchor="mt")
    draw.text(((_LEFT + _RIGHT) / 2, _HEIGHT - 16), _axis(across), fill="black", font=font, anchor="mb")
    draw.text((16, 8), _axis(up), fill="black", font=font, anchor="lt")

    scales = sorted({row.scale for row in evaluation.rows}, reverse=True)
    for index, one in enumerate(scales):
        points = [point(evaluation.base), *(point(row) for row in evaluation.rows if row.scale == one)]
        draw.line(points, fill=_COLOURS[index % len(_COLOURS)], width=3)
    taken = [_box(point(row), 2 * _RADIUS) for row in rows]
    for row in rows:
        colour = _GREY if row is evaluation.base else _COLOURS[scales.index(row.scale) % len(_COLOURS)]
        (middle, high), score, other = point(row), row.scores[across.name], row.scores[up.name]
        draw.line(
            [place(score.value - score.error, other.value), place(score.value + score.error, other.value)], colour
        )
        draw.line(
            [place(score.value, other.value - other.error), place(score.value, other.value + other.error)], colour
        )
        draw.ellipse(_box((middle, high), _RADIUS), fill=colour)
        if row is chosen:
            draw.ellipse(_box((middle, high), 2 * _RADIUS), outline="black", width=4)
        text = f"{row.label}, recommended" if row is chosen else row.label
        _write(draw, text, (middle, high), taken, font, colour)
    save_image(path, np.asarray(canvas.reduce(2)))  # halved for smooth lines


def _axis(measure: Measure) -> str:
    return f"{measure.name.replace('_', ' ')} ({measure.heading})"


def _scale(rows: Sequence[Row], measure: Measure) -> Scale:
    """A scale with a margin around all values and errors."""
    scores = [row.scores[measure.name] for row in rows]
    low = min(score.value - score.error for score in scores)
    high = max(score.value + score.error for score in scores)
    margin = 0.08 * (high - low) or 0.1
    low, high = low - margin, high + margin
    return Scale(low=low, high=high, ticks=round_numbers(low, high))


def _box(point: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    return point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    point: tuple[float, float],
    taken: list[tuple[float, float, float, float]],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    colour: str,
) -> None:
    """A label beside its point, where it covers nothing if there is such a place; `taken` gets its box."""

    def cost(box: tuple[float, float, float, float]) -> float:
        covered = sum(
            max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
            * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
            for other in taken
        )
        return covered + 1e4 * (box[0] < _LEFT or box[2] > _WIDTH or box[1] < 0 or box[3] > _BOTTOM)

    options = []
    for right, down in _PLACES:
        at = point[0] + right * 2 * _RADIUS, point[1] + down * _FONT / 2
        anchor = "lm" if right > 0 else "rm"
        options.append((at, anchor, draw.textbbox(at, text, font=font, anchor=anchor)))
    at, anchor, box = min(options, key=lambda option: cost(option[2]))
    draw.text(at, text, fill=colour, font=font, anchor=anchor)
    taken.append(box)
