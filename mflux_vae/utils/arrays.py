"""Check that what a caller passes is an array of numbers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mflux_vae.errors import ImageError, RunError

FILES = "give files and Pillow images to encode_images"
"""Advice for callers that have no array of an image."""

NOISE_LEVELS = 16
"""Difference between the pixels of a plain area in a lossy format, at most."""

LATENTS = "encode_images returns latents; mx.load reads them from a file"
"""Advice for callers that have no array of latents."""


def as_array(value: object, what: str, expected: str, advice: str) -> mx.array:
    """Convert numbers to an MLX array; one of MLX stays as it is.

    Args:
        what: subject of the error, such as "image is".
        expected: shape that the caller needs.

    Raises:
        ImageError: text, a file name, a Pillow image, or another object that is not an array of numbers.
    """
    if isinstance(value, mx.array):
        return value
    array = None
    several = value if isinstance(value, list | tuple) else [value]
    if not any(hasattr(one, "getbands") for one in several):  # a Pillow image, (H, W, C)
        try:
            array = np.asarray(value)
        except (TypeError, ValueError, RuntimeError):
            array = None
    if array is None or not (array.dtype.kind in "biuf" or array.dtype.name == "bfloat16"):
        raise ImageError(f"{what} {kind_text(value)}; expected an array {expected}: {advice}")
    return mx.array(array)


def kind_text(value: object) -> str:
    """The type of an object, with the dtype of an array and the start of a text."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    shown = str(value)
    kind = f"a {type(value).__name__}"
    return f"{kind} ({shown[:60]!r})" if isinstance(value, str | bytes) or hasattr(value, "__fspath__") else kind


def flaw(computed: mx.array, *, varies: bool = True) -> str | None:
    """What is wrong with the result of a network, such as "NaN or infinite values"; None if nothing is.

    Args:
        varies: whether one value in all places and channels is wrong: a device that fails may leave zeros.
    """
    if not mx.all(mx.isfinite(computed)):
        return "NaN or infinite values"
    if varies and computed.size > 1 and mx.all(computed == computed.reshape(-1)[0]):
        return "the same value everywhere"
    return None


def check_decoded(images: mx.array, what: str = "image") -> None:
    """
    Raises:
        RunError: one of the images (N, ...) has NaN or infinite values, which would be drawn black or white.
    """
    for index, image in enumerate(images):
        if found := flaw(image, varies=False):
            raise RunError(f"{what} {index} has {found}: weights are not finite, or the device failed")


def one_colour(picture: np.ndarray) -> bool:
    """Whether an image, uint8 (H, W, C), is one colour but for the noise of a lossy format: latents may be constant."""
    return bool((np.ptp(picture, axis=(0, 1)) <= NOISE_LEVELS).all())
