"""Charts as HTML: curves are paths of an SVG that is stretched; texts are HTML elements beside it.

Charts need no script; page.js shows the values under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from mflux_vae_train.monitoring.report.curves import Curve, Points, Scale, points, round_numbers, scale

SIZE = 1000
"""Width and height of the SVG's coordinates."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves with one scale.

    Attributes:
        title, note: heading and a sentence below it.
        line: value and name of a horizontal line.
        also: more values that the scale must include.
        logarithmic: None decides by the values.
        ordered: whether the curves are levels of one quantity and get a colour gradient.
        wide: whether the chart takes a full row.
    """

    title: str
    curves: Sequence[Curve]
    note: str = ""
    line: tuple[float, str] | None = None
    also: Sequence[float] = ()
    logarithmic: bool | None = None
    ordered: bool = False
    wide: bool = False


def draw(chart: Chart, *, total: int) -> str:
    """A chart over updates 0 to `total`, as a figure element."""
    drawn = [points(curve) for curve in chart.curves]
    y = scale(drawn, also=[*chart.also, *([chart.line[0]] if chart.line else [])], logarithmic=chart.logarithmic)
    x = Scale(low=0, high=max(total, 1), ticks=[tick for tick in round_numbers(0, max(total, 2)) if tick == int(tick)])
    kind = " ".join(["chart", *(["ordered"] if chart.ordered else []), *(["wide"] if chart.wide else [])])
    last = [format_number(one.smoothed[-1]) if len(one.smoothed) else "" for one in drawn]
    legend = "".join(
        f'<li class="c{index}"><i></i>{escape(curve.name)} <b>{value}</b></li>'
        for index, (curve, value) in enumerate(zip(chart.curves, last, strict=True))
    )
    label = f"{chart.title} over {total} updates: " + ", ".join(
        f"{curve.name} from {format_number(one.smoothed[0])} to {format_number(one.smoothed[-1])}"
        for curve, one in zip(chart.curves, drawn, strict=True)
        if len(one.smoothed)
    )
    return f"""<figure class="{kind}">
<figcaption><h3>{escape(chart.title)}</h3>{f"<p>{escape(chart.note)}</p>" if chart.note else ""}
<ul class="legend">{legend}</ul></figcaption>
<div class="plot" tabindex="0" data-total="{total}">
<div class="ys">{_labels(y, "bottom")}</div>
<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">
{_grid(y)}{_line(chart, y)}
{"".join(_paths(index, curve, one, x, y) for index, (curve, one) in enumerate(zip(chart.curves, drawn, strict=True)))}
</svg>
{_line_label(chart, y)}<div class="xs">{_labels(x, "left")}</div>
<script type="application/json">{_data(chart, drawn, y)}</script>
</div></figure>"""


def format_number(value: float) -> str:
    """A number with three digits; small powers of ten as 1e-4."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 10000:
        return f"{value:,.0f}" if abs(value) < 1e7 else _short(value)
    return (
        f"{value:.3g}"
        if abs(value) >= 1e-3 and abs(value) < 1000
        else _short(value)
        if abs(value) < 1
        else f"{value:.0f}"
    )


def _short(value: float) -> str:
    digits, power = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _labels(one: Scale, side: str) -> str:
    return "".join(
        f'<span style="{side}:{100 * float(one.at(tick)):.2f}%">{format_number(tick)}</span>' for tick in one.ticks
    )


def _grid(y: Scale) -> str:
    return '<path class="grid" d="' + "".join(f"M0 {_height(y.at(tick))}H{SIZE}" for tick in y.ticks) + '"/>'


def _line(chart: Chart, y: Scale) -> str:
    return f'<path class="line" d="M0 {_height(y.at(chart.line[0]))}H{SIZE}"/>' if chart.line else ""


def _line_label(chart: Chart, y: Scale) -> str:
    if not chart.line:
        return ""
    return f'<span class="named" style="bottom:{100 * float(y.at(chart.line[0])):.2f}%">{escape(chart.line[1])}</span>'


def _paths(index: int, curve: Curve, one: Points, x: Scale, y: Scale) -> str:
    """All values as a faint line and their average; a curve that is not smoothed is one line."""
    if not len(one.values):
        return ""
    positions = x.at(one.updates)
    average = _path(positions, y.at(one.smoothed))
    if not (curve.smooth and curve.faint):
        return f'<path class="average c{index}" d="{average}"/>'
    # a zigzag between the lowest and highest value of each point, so that thinning hides no outlier
    zigzag = np.stack([one.lowest, one.highest], 1).reshape(-1)
    raw = (
        _path(np.repeat(positions, 2), y.at(zigzag))
        if (one.lowest != one.highest).any()
        else _path(positions, y.at(one.values))
    )
    return f'<path class="raw c{index}" d="{raw}"/><path class="average c{index}" d="{average}"/>'


def _path(positions: np.ndarray, heights: np.ndarray) -> str:
    pairs = [
        f"{_rounded(SIZE * position)} {_height(height)}" for position, height in zip(positions, heights, strict=True)
    ]
    if len(pairs) == 1:
        pairs *= 2  # its round caps form a dot
    return "M" + "L".join(pairs)


def _height(position: Any) -> str:
    return _rounded(SIZE * (1 - float(position)))


def _rounded(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _data(chart: Chart, drawn: Sequence[Points], y: Scale) -> str:
    """JSON for the script; contains no "<" that could end the element."""
    curves = [
        {
            "name": curve.name,
            "updates": one.updates.tolist(),
            "values": [_five(value) for value in one.values],
            "average": [_five(value) for value in one.smoothed] if curve.smooth else None,
            "heights": [round(float(position), 4) for position in y.at(one.smoothed)],
        }
        for curve, one in zip(chart.curves, drawn, strict=True)
    ]
    return json.dumps(curves, separators=(",", ":")).replace("<", "\\u003c")


def _five(value: float) -> float:
    return float(f"{value:.5g}")
