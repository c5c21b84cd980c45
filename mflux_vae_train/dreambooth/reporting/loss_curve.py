"""loss.png: the losses of a run over its updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mflux_vae.images import save_image
from mflux_vae_train.monitoring.report.charts import number
from mflux_vae_train.monitoring.report.curves import Curve, Scale, points, round_numbers, scale

_LOSSES = ("instance_loss", "prior_loss")
_DARK, _LIGHT, _GRID = ("#1f77b4", "#e0701a"), ("#c7ddec", "#f7dbc6"), "#e4e4e4"
_CURVE_SIZE, _CURVE_START, _CURVE_END, _LETTERS = (1920, 1080), (150, 40), (1880, 970), 32
"""Pixels before the image is halved: image, corners of the axes, font size."""


def write_loss_curve(records: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the losses over updates: each value in a light colour, the running average over it."""
    (width, height), (left, top), (right, bottom) = _CURVE_SIZE, _CURVE_START, _CURVE_END
    names = [name for name in _LOSSES if any(name in record for record in records)]
    curves = {}
    for name in names:
        updates, values = zip(
            *((int(record["update"]), record[name]) for record in records if name in record), strict=True
        )
        curves[name] = points(Curve(name=name, updates=updates, values=values))
    y = scale(list(curves.values()))
    last = max((int(record["update"]) for record in records), default=1)
    x = Scale(low=0, high=last, ticks=[tick for tick in round_numbers(0, max(last, 2)) if tick == int(tick)])

    def place(update: np.ndarray | float, value: np.ndarray | float) -> list[tuple[float, float]]:
        px, py = np.broadcast_arrays(left + x.at(update) * (right - left), bottom - y.at(value) * (bottom - top))
        return list(zip(px.ravel().tolist(), py.ravel().tolist(), strict=True))

    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_LETTERS)
    for tick in y.ticks:
        draw.line(place(0, tick) + place(last, tick), fill=_GRID, width=2)
        draw.text((left - 12, place(0, tick)[0][1]), number(tick), fill="black", font=font, anchor="rm")
    for tick in x.ticks:
        draw.text((place(tick, 0)[0][0], bottom + 12), number(tick), fill="black", font=font, anchor="mt")
    draw.text(((left + right) / 2, height - 12), "updates", fill="black", font=font, anchor="mb")
    for index, (name, curve) in enumerate(curves.items()):
        draw.line(place(curve.updates, curve.values), fill=_LIGHT[index], width=2)
        draw.text((right - 12, top + 1.5 * _LETTERS * index), name.replace("_", " "), _DARK[index], font, anchor="rt")
    for index, curve in enumerate(curves.values()):
        draw.line(place(curve.updates, curve.smoothed), fill=_DARK[index], width=5)
    save_image(path, np.asarray(canvas.reduce(2)))  # halved, so that lines are smooth
