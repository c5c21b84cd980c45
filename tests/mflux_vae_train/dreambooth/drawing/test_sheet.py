"""Contact sheets: where pictures and labels are."""

from __future__ import annotations

import numpy as np

from mflux_vae_train.dreambooth.drawing.sheet import MAX_WIDTH, contact_sheet

LONG = "an astronaut on a horse, 星 ⭐ café, " * 20


def flat(row: int, column: int) -> np.ndarray:
    return np.full((64, 96, 3), (20 + 10 * row, 100 + 10 * column, 7), np.uint8)


def places(sheet: np.ndarray, row: int, column: int) -> tuple[slice, slice]:
    """Where the colour of a picture is; it fills a rectangle."""
    found = (sheet == flat(row, column)[0, 0]).all(axis=2)
    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    place = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    assert found[place].all()
    return place


def test_rows_and_columns_are_aligned_and_labelled() -> None:
    sheet = contact_sheet(["first", LONG], ["untrained", "scale 0.6", LONG], flat)
    found = {(row, column): places(sheet, row, column) for row in range(2) for column in range(3)}
    assert all(found[row, column] == (found[row, 0][0], found[0, column][1]) for row, column in found)
    top, left = found[0, 0][0].start, found[0, 0][1].start
    assert (sheet[:top, found[0, 2][1]] < 128).any(), "a label above"
    assert (sheet[found[1, 0][0], :left] < 128).any(), "a label beside"
    assert found[0, 0][0].stop - top == 128, "enlarged by a whole factor"


def test_one_row_continues_below() -> None:
    sheet = contact_sheet([""], [f"seed {seed}" for seed in range(10)], flat)
    assert places(sheet, 0, 8)[0].start > places(sheet, 0, 0)[0].stop
    assert places(sheet, 0, 8)[1] == places(sheet, 0, 0)[1]


def test_wide_sheets_are_shrunk() -> None:
    sheet = contact_sheet(["a", "b"], ["c"] * 5, lambda row, column: np.zeros((1024, 1024, 3), np.uint8))
    assert sheet.shape[1] < MAX_WIDTH + 300
