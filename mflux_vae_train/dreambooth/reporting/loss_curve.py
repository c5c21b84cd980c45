"""loss.png: the losses of a run over its updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mflux_vae.images import save_image
from mflux_vae_train.monitoring.report.charts import format_number
from mflux_vae_train.monitoring.report.curves import Curve, Scale, points, round_numbers, scale

_LOSSES = ("instance_loss", "prior_loss")
_DARK, _LIGHT, _GRID = ("#1f77b4", "#e0701a"), ("#c7ddec", "#f7dbc6"), "#e4e4e4"
_WIDTH, _HEIGHT, _FONT = 1920, 1080, 32
_LEFT, _TOP, _RIGHT, _BOTTOM = 150, 40, 1880, 970
"""Axes in pixels, before the image is halved."""


def write_loss_curve(records: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the losses over updates: values in a light colour, the running average in a dark one."""
    series = {name: [(int(one["update"]), one[name]) for one in records if name in one] for name in _LOSSES}
    curves = {
        name: points(Curve(name=name, updates=[update for update, _ in pairs], values=[value for _, value in pairs]))
        for name, pairs in series.items()
        if pairs
    }
    y = scale(list(curves.values()))
    last = max((int(record["update"]) for record in records), default=1)
    x = Scale(low=0, high=last, ticks=[tick for tick in round_numbers(0, max(last, 2)) if tick == int(tick)])

    def line(updates: np.ndarray | float, values: np.ndarray | float) -> list[tuple[float, float]]:
        px, py = np.broadcast_arrays(
            _LEFT + x.at(updates) * (_RIGHT - _LEFT), _BOTTOM - y.at(values) * (_BOTTOM - _TOP)
        )
        return list(zip(px.ravel().tolist(), py.ravel().tolist(), strict=True))

    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_FONT)
    for tick in y.ticks:
        draw.line(line(0, tick) + line(last, tick), fill=_GRID, width=2)
        draw.text((_LEFT - 12, line(0, tick)[0][1]), format_number(tick), fill="black", font=font, anchor="rm")
    for tick in x.ticks:
        draw.text((line(tick, 0)[0][0], _BOTTOM + 12), format_number(tick), fill="black", font=font, anchor="mt")
    draw.text(((_LEFT + _RIGHT) / 2, _HEIGHT - 12), "updates", fill="black", font=font, anchor="mb")
    for index, (name, curve) in enumerate(curves.items()):
        draw.line(line(curve.updates, curve.values), fill=_LIGHT[index], width=2)
        draw.text((_RIGHT - 12, _TOP + 1.5 * _FONT * index), name.replace("_", " "), _DARK[index], font, anchor="rt")
    for index, curve in enumerate(curves.values()):
        draw.line(line(curve.updates, curve.smoothed), fill=_DARK[index], width=5)
    save_image(path, np.asarray(canvas.reduce(2)))  # halved for smooth lines
