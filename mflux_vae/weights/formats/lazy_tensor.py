"""A tensor as it lies in a file: what is known before it is read, and reading it without MLX's own loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from mflux_vae.errors import WeightsError

LARGEST_DIMENSION = 2**31 - 1
"""MLX counts in 32 bits."""

MOST_DIMENSIONS = 64
"""As numpy."""

_HELD_AS = {"bfloat16": "uint16"}
"""What holds the bits of a dtype that numpy does not have."""

_READ_AS = {"float64": "float32", "bfloat16": "uint16"}
"""What numbers become on their way to MLX."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file.

    Attributes:
        shape: as stored.
        dtype: as stored, by its name in numpy and MLX (`float32`, `bfloat16`, ...).
        load: reads it, float64 as float32; a WeightsError where MLX has no such dtype.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], mx.array]


def width(dtype: str) -> int | None:
    """Bytes of one number; None where there is no such dtype."""
    try:
        return np.dtype(_HELD_AS.get(dtype, dtype)).itemsize
    except TypeError:
        return None


def read_numbers(
    data: np.ndarray, name: str, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None
) -> mx.array:
    """A tensor out of a file's bytes.

    Args:
        data: (n,) uint8, beginning with the tensor's first element and reaching at least to its last.
        name: for the message.
        dtype, shape: of the tensor.
        strides: in elements; None for a contiguous one.

    Raises:
        WeightsError: numpy has no such dtype.
    """
    if (size := width(dtype)) is None:
        raise WeightsError(f"{name} is stored as {dtype}, which is not read; save it as float32")
    kind = np.dtype(_HELD_AS.get(dtype, dtype))
    if not prod(shape):
        view = np.empty(shape, kind)
    elif strides is None:
        view = data[: prod(shape) * size].view(kind).reshape(shape)
    else:
        numbers = data[: len(data) // size * size].view(kind)
        view = np.lib.stride_tricks.as_strided(numbers, shape, [size * stride for stride in strides])
    loaded = mx.array(np.require(view, _READ_AS.get(dtype, dtype), ["C", "ALIGNED"]))
    return loaded.view(mx.bfloat16) if dtype == "bfloat16" else loaded
