from __future__ import annotations

import numpy as np

from mflux_vae.images import load_image, save_image
from mflux_vae_train.dreambooth.reporting import preview_grid
from tests.mflux_vae_train.dreambooth.conftest import subject


def grey(level, side=16, count=2):
    return np.full((side, side * count, 3), level, np.uint8)


def test_grid_has_the_subject_first_and_a_row_per_preview(tmp_path):
    for update in (0, 5, 10):
        save_image(preview_grid.preview_file(tmp_path, update), grey(50 + update))
    path = preview_grid.write_progress(tmp_path, [subject(index)[:16] for index in range(5)], columns=2)
    sheet = load_image(path)
    enlarged = 16 * 8  # to 128 pixels
    assert sheet.shape[0] == 4 * enlarged + 5 * 4
    middles = [4 + row * (enlarged + 4) + enlarged // 2 for row in range(4)]
    column = sheet.shape[1] - 4 - (4 * enlarged + 3 * 4) + 5
    assert [int(sheet[middle, column, 0]) for middle in middles[1:]] == [50, 55, 60]
    assert tuple(sheet[middles[0] - enlarged // 4, column]) == (255, 140, 0)


def test_prompts_are_rows_of_a_preview_and_side_by_side_in_the_grid(tmp_path):
    save_image(preview_grid.preview_file(tmp_path, 0), np.concatenate([grey(60), grey(90)]))
    (first, second) = preview_grid.split_preview(preview_grid.preview_file(tmp_path, 0), columns=2)
    assert len(first) == len(second) == 2 and (second[1] == 90).all() and first[0].shape == (16, 16, 3)
    sheet = load_image(preview_grid.write_progress(tmp_path, [grey(200, count=1)], columns=2))
    assert sheet.shape[0] == 2 * (128 + 4) + 4 and sheet.shape[1] > 4 * 128
    assert tuple(sheet[200, [-200, -10], 0]) == (90, 90) and sheet[200, -460, 0] == 60


def test_long_runs_keep_first_and_last_preview(tmp_path):
    for update in range(0, 40):
        save_image(preview_grid.preview_file(tmp_path, update), grey(update + 1))
    sheet = load_image(preview_grid.write_progress(tmp_path, [grey(200, count=1)], columns=2))
    assert sheet.shape[0] == (preview_grid.MAX_ROWS + 1) * (128 + 4) + 4
    assert (sheet == 1).all(-1).any() and (sheet == 40).all(-1).any()


def test_large_images_are_shrunk(tmp_path):
    save_image(preview_grid.preview_file(tmp_path, 0), grey(50, side=512))
    sheet = load_image(preview_grid.write_progress(tmp_path, [grey(200, side=512, count=1)], columns=2))
    assert sheet.shape[0] == 2 * 256 + 3 * 4
