"""Quality of a reconstruction, and where it differs. Images are uint8 (H, W, C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.images import to_pictures
from mflux_vae.metrics import image as metrics
from mflux_vae.metrics.lpips import LPIPS

_LPIPS_MIN_SIDE = 16
"""Smallest side (pixels) for LPIPS."""


def to_nchw(picture: np.ndarray) -> mx.array:
    """(H, W, C) -> (1, C, H, W), the input of `VAE`."""
    return mx.array(picture.transpose(2, 0, 1)[None])


def from_chw(image: mx.array) -> np.ndarray:
    """(C, H, W) in [0, 255] -> uint8 (H, W, C)."""
    return to_pictures(np.array(image).transpose(1, 2, 0) / 127.5 - 1)


def quality(picture: np.ndarray, again: np.ndarray, lpips: LPIPS | None = None) -> dict[str, float]:
    """`mse` in squared levels, `psnr` in dB, `ssim`, and `lpips` with a network; NaN if the image is too small."""
    one, other = (value.transpose(2, 0, 1)[None] for value in (picture, again))
    side = min(picture.shape[:2])
    found = {
        "mse": float(metrics.mse(one, other)),
        "psnr": float(metrics.psnr(one, other)),
        "ssim": float(metrics.ssim(one, other)) if side >= metrics.WINDOW else math.nan,
    }
    if lpips is not None:
        found["lpips"] = float(metrics.lpips(one, other, lpips)) if side >= _LPIPS_MIN_SIDE else math.nan
    return found


def error_map(picture: np.ndarray, again: np.ndarray, amplify: float) -> np.ndarray:
    """Absolute difference times `amplify`."""
    difference = np.abs(picture.astype(np.float32) - again) * amplify
    return np.clip(np.rint(difference), 0, 255).astype(np.uint8)


def mean_of(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def without_infinities(content: Any) -> Any:
    """Replace infinity and NaN, which JSON lacks, with None."""
    if isinstance(content, dict):
        return {name: without_infinities(value) for name, value in content.items()}
    if isinstance(content, list):
        return [without_infinities(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
