"""Images of a run: the subject appearing over time, and the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mflux_vae.images import labelled_rows, load_image, resized, save_image, strip
from mflux_vae_train.monitoring.report.charts import number
from mflux_vae_train.monitoring.report.curves import Curve, Scale, points, round_numbers, scale

MOST_ROWS = 12
SMALLEST_SIDE, LARGEST_SIDE = 128, 256
"""Images of other sizes are enlarged, by a whole factor, or shrunk for the overview."""

_LOSSES = ("instance_loss", "prior_loss")
_DARK, _LIGHT, _GRID = ("#1f77b4", "#e0701a"), ("#c7ddec", "#f7dbc6"), "#e4e4e4"
_CURVE_SIZE, _CURVE_START, _CURVE_END, _LETTERS = (1920, 1080), (150, 40), (1880, 970), 32
"""Of the loss curve, in pixels before it is halved: the image, the corners of its axes, letters."""


def preview_file(samples: Path, update: int) -> Path:
    """Where the previews after an update lie: a row of pictures for each prompt."""
    return samples / f"step-{update:05d}.png"


def previews(samples: Path) -> list[tuple[int, Path]]:
    """(update, file) of the previews that there are, in order; of many `MOST_ROWS`, evenly spaced, first and last."""
    found = sorted((int(path.stem.removeprefix("step-")), path) for path in samples.glob("step-*.png"))
    if len(found) > MOST_ROWS:
        chosen = np.linspace(0, len(found) - 1, MOST_ROWS).round().astype(int)
        found = [found[index] for index in chosen]
    return found


def split_preview(preview: Path, *, columns: int) -> list[list[np.ndarray]]:
    """The pictures of a preview, uint8 (side, side, 3) each: a list for each prompt."""
    sheet = load_image(preview)
    side = sheet.shape[1] // columns
    rows = np.split(sheet, sheet.shape[0] // side, axis=0)
    return [np.split(row, columns, axis=1) for row in rows]


def write_progress(samples: Path, instance: Sequence[np.ndarray], *, columns: int) -> Path:
    """Writes progress.png: the instance pictures above the previews, a labelled row per update.

    The rows are read from the previews on disk, so that a resumed run shows those of before, too. Images of further
    prompts stand at the right of the first one's.

    Args:
        instance: uint8 squares of the previews' size; the first ones are shown.
        columns: pictures of a prompt in a preview.
    """
    rows = []
    for update, path in previews(samples):
        rows.append((label(update), [picture for one in split_preview(path, columns=columns) for picture in one]))
    side = rows[0][1][0].shape[0]
    rows.insert(0, ("subject", list(instance[: shown(columns)])))
    path = samples / "progress.png"
    save_image(path, labelled_rows([(label, _sized(row, side)) for label, row in rows]))
    return path


def shown(columns: int) -> int:
    """How many of the instance pictures the overview shows."""
    return max(columns, 4)


def label(update: int) -> str:
    """What a row of previews is called."""
    return "untrained" if update == 0 else f"step {update}"


def _sized(row: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Images beside each other, in a size that can be looked at."""
    if side > LARGEST_SIDE:
        return strip([resized(picture, LARGEST_SIDE / side) for picture in row], gap=4)
    scale = -(-SMALLEST_SIDE // side)
    return strip([picture.repeat(scale, axis=0).repeat(scale, axis=1) for picture in row], gap=4)


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
        across, up = np.broadcast_arrays(left + x.at(update) * (right - left), bottom - y.at(value) * (bottom - top))
        return list(zip(across.ravel().tolist(), up.ravel().tolist(), strict=True))

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
