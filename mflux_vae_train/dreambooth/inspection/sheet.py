"""Contact sheet of the images as cropped, each with its name and what is remarkable about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mflux_vae.compare.labels import caption
from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.images import covered, grid, image_text, load_mask
from mflux_vae.utils.paths import same_place
from mflux_vae.utils.prefetch import prefetch
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.inspection.findings import ImageFinding

TEXT_KEY = "mflux-dreambooth check"
"""PNG text chunk of a contact sheet. Only such files are replaced."""

MOST = 200
"""Images in a sheet; those with remarks first."""

_SIDE, _BORDER, _COLUMNS, _REMARKS = 224, 4, 8, 3
_ATTENTION, _MASKED = (230, 120, 0), (255, 0, 200)
"""Colours of the border of an image with remarks, and of what a mask leaves out."""


def draw_sheet(images: Sequence[ImageFinding]) -> np.ndarray:
    """uint8 (H, W, 3), of at most `MOST` images, at least one."""
    if len(images) > MOST:
        images = sorted(images, key=lambda one: not one.remarks)[:MOST]
    lines = min(_REMARKS, max(len(one.remarks) for one in images))
    cells = list(prefetch(lambda one: _cell(one, lines), images))
    return grid(cells, min(_COLUMNS, math.ceil(math.sqrt(len(cells) * 1.5))), gap=8)


def sheet_file(output: str | None, settings: DreamBoothSettings) -> Path:
    """The file to write: `output`, or FOLDER-check.png in the current folder, numbered if another file has that name.

    Raises:
        SettingsError: `output` is not a PNG file, replaces another file, or would be an image of the subject.
    """
    folders = [Path(one.instance_data_dir) for one in settings.subjects]
    if output is None:
        here = Path.cwd()
        if any(same_place(here, folder) for folder in folders):
            here = here.parent
        name = folders[0].resolve().name or "images"
        numbered = (here / f"{name}-check{f'-{number}' if number else ''}.png" for number in range(10**6))
        return next(path for path in numbered if _is_free(path))
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise SettingsError(f"--output {path}: the contact sheet is a PNG file; end its name in .png")
    if any(same_place(path.parent, folder) for folder in folders):
        raise SettingsError(f"--output {path}: in this folder it would be an image of the subject; give another one")
    if not _is_free(path):
        raise SettingsError(f"--output {path} exists and is not a contact sheet of this command; give another name")
    return path


def _is_free(path: Path) -> bool:
    if not path.exists():
        return True
    try:
        return TEXT_KEY in image_text(path)
    except ImageError:
        return False


def _cell(finding: ImageFinding, remarks: int) -> np.ndarray:
    """An image with its labels, uint8 (H, _SIDE, 3); shapes other than squares are on white."""
    image, crop = finding.image, finding.crop
    picture = image.read(crop)
    inner = _SIDE - 2 * _BORDER
    factor = inner / max(crop.shape)
    height, width = (max(1, round(side * factor)) for side in crop.shape)
    picture = covered(picture, (height, width))
    if image.mask is not None:
        mask = covered(crop.apply(load_mask(image.mask, notes=ImageNotes())), (height, width)) / np.float32(255)
        faded = 0.5 * picture + 0.5 * np.array(_MASKED, np.float32)
        picture = np.rint(picture * mask + faded * (1 - mask)).astype(np.uint8)
    cell = np.full((_SIDE, _SIDE, 3), 255, np.uint8)
    top, left = (_SIDE - height) // 2, (_SIDE - width) // 2
    if finding.remarks:
        cell[top - _BORDER : top + height + _BORDER, left - _BORDER : left + width + _BORDER] = _ATTENTION
    cell[top : top + height, left : left + width] = picture
    shown = list(finding.remarks[:remarks])
    if len(finding.remarks) > remarks:
        shown[-1] = f"{shown[-1]}; and {len(finding.remarks) - remarks} more"
    size = f"{image.size[1]}x{image.size[0]}, {finding.kept:.0%} kept"
    if finding.mask is not None:
        size += f", mask {finding.mask:.0%}"
    return np.concatenate([cell, caption([finding.name, size, *shown, *[""] * (remarks - len(shown))], _SIDE)])
