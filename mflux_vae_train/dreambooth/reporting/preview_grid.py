"""Pictures of a run: the subject appearing over time, and the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mflux_vae.images import labelled_rows, load_image, resized, save_image, strip
from mflux_vae_train.monitoring.report.curves import smoothed

MOST_ROWS = 12
SMALLEST_SIDE, LARGEST_SIDE = 128, 256
"""Pictures of other sizes are enlarged, by a whole factor, or shrunk for the overview."""


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


def pictures_of(preview: Path, *, columns: int) -> list[list[np.ndarray]]:
    """The pictures of a preview, uint8 (side, side, 3) each: a list for each prompt."""
    sheet = load_image(preview)
    side = sheet.shape[1] // columns
    rows = np.split(sheet, sheet.shape[0] // side, axis=0)
    return [np.split(row, columns, axis=1) for row in rows]


def write_progress(samples: Path, instance: Sequence[np.ndarray], *, columns: int) -> Path:
    """Writes progress.png: the instance pictures above the previews, a labelled row per update.

    The rows are read from the previews on disk, so that a resumed run shows those of before, too. Pictures of further
    prompts stand at the right of the first one's.

    Args:
        instance: uint8 squares of the previews' size; the first ones are shown.
        columns: pictures of a prompt in a preview.
    """
    rows = []
    for update, path in previews(samples):
        rows.append((label(update), [picture for one in pictures_of(path, columns=columns) for picture in one]))
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
    """Pictures beside each other, in a size that can be looked at."""
    if side > LARGEST_SIDE:
        return strip([resized(picture, LARGEST_SIDE / side) for picture in row], gap=4)
    scale = -(-SMALLEST_SIDE // side)
    return strip([picture.repeat(scale, axis=0).repeat(scale, axis=1) for picture in row], gap=4)


def write_loss_curve(records: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Draws the losses over updates; False where matplotlib is not installed (extra `plots`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in ("instance_loss", "prior_loss"):
        points = [(record["update"], record[name]) for record in records if name in record]
        if not points:
            continue
        steps, values = np.array(points).T
        (line,) = axes.plot(steps, values, alpha=0.25, linewidth=1)
        axes.plot(steps, smoothed(values), color=line.get_color(), label=name.replace("_", " "))
    axes.set(xlabel="step (optimizer updates)", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
    return True
