"""progress.png: the previews of a run below each other, with the subject on top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mflux_vae.images import labelled_rows, load_image, resized, save_image, strip

MAX_ROWS = 12
MIN_SIDE, MAX_SIDE = 128, 256
"""Images of other sizes are enlarged by a whole factor, or shrunk."""


def preview_file(samples: Path, update: int) -> Path:
    """The file of the previews after an update. It has one row of images per prompt."""
    return samples / f"step-{update:05d}.png"


def previews(samples: Path) -> list[tuple[int, Path]]:
    """(update, file) of the existing previews, in order; at most `MAX_ROWS`, evenly spaced, with the first and last."""
    found = sorted((int(path.stem.removeprefix("step-")), path) for path in samples.glob("step-*.png"))
    if len(found) > MAX_ROWS:
        found = [found[index] for index in np.linspace(0, len(found) - 1, MAX_ROWS).round().astype(int)]
    return found


def split_preview(preview: Path, *, columns: int) -> list[list[np.ndarray]]:
    """The images in a preview file, uint8 (side, side, 3) each: one list per prompt."""
    sheet = load_image(preview)
    rows = np.split(sheet, sheet.shape[0] * columns // sheet.shape[1], axis=0)
    return [np.split(row, columns, axis=1) for row in rows]


def subject_count(columns: int) -> int:
    """How many instance images progress.png shows."""
    return max(columns, 4)


def write_progress(samples: Path, subject: Sequence[np.ndarray], *, columns: int) -> Path:
    """Write progress.png: instance images on top, then a labelled row per preview.

    Reads the previews from disk, so a resumed run shows earlier ones. Further prompts follow to the right.

    Args:
        subject: uint8 squares of the previews' size; at least four, or `columns`, of them are shown.
        columns: images per prompt in a preview.
    """
    rows = [("subject", list(subject[: subject_count(columns)]))]
    for update, path in previews(samples):
        rows.append((label(update), [image for row in split_preview(path, columns=columns) for image in row]))
    side = rows[-1][1][0].shape[0]
    path = samples / "progress.png"
    save_image(path, labelled_rows([(label, _strip(row, side)) for label, row in rows]))
    return path


def label(update: int) -> str:
    """Label of a row of previews."""
    return "untrained" if update == 0 else f"step {update}"


def _strip(row: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Images side by side, resized to a legible size."""
    if side > MAX_SIDE:
        return strip([resized(image, MAX_SIDE / side) for image in row], gap=4)
    factor = -(-MIN_SIDE // side)
    return strip([image.repeat(factor, axis=0).repeat(factor, axis=1) for image in row], gap=4)
