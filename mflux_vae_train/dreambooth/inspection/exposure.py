"""Recognise pictures that are too dark, too bright or blurred to teach details.

Photographs of DreamBooth's data set are far from the limits: their brightest hundredth is above 126, their darkest
below 130, their sharpness above 0.33; blurred by a Gaussian of 0.8 % of the side it is below 0.25, of 1.6 % below 0.12.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mflux_vae.images import averaged

_SIDE = 128
"""Side in pixels at which sharpness is measured."""

_DARK, _BRIGHT, _BLURRED = 60, 190, 0.2
_WEAKEST = 12
"""Levels; sharpness is not defined where all edges are weaker."""


def exposure_remarks(picture: np.ndarray) -> list[str]:
    """Of uint8 (H, W, 3)."""
    side = min(_SIDE, *picture.shape[:2])
    levels = averaged(picture, (side, side)).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    remarks = []
    if np.quantile(levels, 0.99) < _DARK:
        remarks.append("very dark")
    if np.quantile(levels, 0.01) > _BRIGHT:
        remarks.append("very bright")
    sharp = [*_sharpness(levels), *_sharpness(levels.T)]
    if side == _SIDE and sharp and max(sharp) < _BLURRED:
        remarks.append("blurred")
    return remarks


def _sharpness(levels: np.ndarray) -> Iterator[float]:
    """Yield second over first differences at the strongest edges of the rows, if there are edges."""
    change = np.abs(levels[:, 2:] - levels[:, :-2])
    curve = np.abs(levels[:, 2:] - 2 * levels[:, 1:-1] + levels[:, :-2])
    edges = change >= np.quantile(change, 0.98)
    strength = float(change[edges].mean())
    if strength >= _WEAKEST:
        yield float(curve[edges].mean()) / strength
