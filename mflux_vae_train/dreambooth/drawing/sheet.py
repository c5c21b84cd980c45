"""A contact sheet: pictures in rows and columns, with a label above each column and beside each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mflux_vae.compare.labels import caption, wrapped
from mflux_vae.images import resized, strip

MIN_SIDE, MAX_WIDTH = 128, 4096
"""Pictures with a smaller side are enlarged by a whole factor, and shrunk where a row of them would be wider."""

PER_LINE = 8
"""Pictures of a line, if only one thing varies."""

_GAP, _MARGIN, _LINES = 6, 190, 5
"""Pixels between pictures, width of the labels of rows, and lines of a label at most."""

Picture = Callable[[int, int], np.ndarray]
"""(row, column) -> uint8 (H, W, 3), all of one size."""


def contact_sheet(rows: Sequence[str], columns: Sequence[str], picture: Picture) -> np.ndarray:
    """
    Args:
        rows, columns: labels; a single row has none beside it. It continues below after `PER_LINE` columns.
        picture: called for one row of the sheet after another.
    """
    step = PER_LINE if len(rows) == 1 else len(columns)
    starts = range(0, len(columns), step)
    widest = min(step, len(columns))
    lines: list[np.ndarray] = []
    for start in starts:
        part = range(start, min(start + step, len(columns)))
        for row, label in enumerate(rows):
            cells = [_legible(picture(row, column), widest) for column in part]
            height, width = cells[0].shape[:2]
            beside = [_beside(label, height)] if len(rows) > 1 else []
            if row == 0:
                above = [caption(wrapped(columns[column], width, _LINES), width) for column in part]
                lines.append(_line([*(_blank((0, _MARGIN, 3)) for _ in beside), *above]))
            lines.append(_line([*beside, *cells]))
    width = max(line.shape[1] for line in lines)
    gap = _blank((_GAP, width, 3))
    return np.concatenate([part for line in lines for part in (_padded(line, (line.shape[0], width)), gap)])


def _legible(picture: np.ndarray, count: int) -> np.ndarray:
    """Enlarge or shrink a picture that stands in a row of so many."""
    if count * picture.shape[1] > MAX_WIDTH:
        return resized(picture, MAX_WIDTH / (count * picture.shape[1]))
    factor = max(1, -(-MIN_SIDE // min(picture.shape[:2])))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _beside(label: str, height: int) -> np.ndarray:
    """The label of a row, in the middle of its height."""
    text = caption(wrapped(label, _MARGIN - _GAP, _LINES), _MARGIN)
    below = max(0, (height - text.shape[0]) // 2)
    return np.concatenate([text, _blank((below, _MARGIN, 3))])


def _line(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts side by side, aligned at the bottom."""
    height = max(part.shape[0] for part in parts)
    return strip([_padded(part, (height, part.shape[1])) for part in parts], gap=_GAP)


def _padded(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture with white above it and at its right."""
    whole = _blank((*size, 3))
    whole[size[0] - picture.shape[0] :, : picture.shape[1]] = picture
    return whole


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, 255, np.uint8)
