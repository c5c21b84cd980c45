"""What a person looks at after a run: the subject appearing over time, and the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mflux_vae.images import labelled_rows, load_image, resized, save_image, strip

MOST_ROWS = 12
SMALLEST_SIDE, LARGEST_SIDE = 128, 256
"""Pictures of other sizes are enlarged, by a whole factor, or shrunk for the overview."""


def preview_file(samples: Path, update: int) -> Path:
    """Where the previews after an update lie: one row of pictures."""
    return samples / f"step-{update:05d}.png"


def write_progress(samples: Path, instance: Sequence[np.ndarray], *, columns: int) -> Path:
    """Writes progress.png: the instance pictures above the previews, a labelled row per update.

    The rows are read from the previews on disk, so that a resumed run shows those of before, too.

    Args:
        instance: uint8 (side, side, 3) each, of the previews' size.
        columns: pictures in a preview.
    """
    previews = [(int(path.stem.removeprefix("step-")), path) for path in sorted(samples.glob("step-*.png"))]
    if len(previews) > MOST_ROWS:
        # Evenly spaced, first and last among them.
        chosen = np.linspace(0, len(previews) - 1, MOST_ROWS).round().astype(int)
        previews = [previews[index] for index in chosen]
    side = instance[0].shape[0]
    rows = [("subject", list(instance[: max(columns, 4)]))]
    for update, path in previews:
        row = load_image(path)
        rows.append(("untrained" if update == 0 else f"step {update}", np.split(row, row.shape[1] // side, axis=1)))
    path = samples / "progress.png"
    save_image(path, labelled_rows([(label, _sized(row, side)) for label, row in rows]))
    return path


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


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential average over about a twentieth of the run, started without bias."""
    keep = 1 - 1 / max(2.0, len(values) / 20)
    total, weight, averaged = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averaged.append(total / weight)
    return np.array(averaged)
