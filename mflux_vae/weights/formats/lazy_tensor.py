"""A tensor in a file that is loaded on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from mflux_vae.errors import WeightsError

MAX_DIMENSION_SIZE = 2**31 - 1
"""MLX uses 32-bit sizes."""

MAX_DIMENSIONS = 64
"""Limit of numpy."""

_HELD_AS = {"bfloat16": "uint16"}
"""numpy dtype with the bits of a dtype that numpy lacks."""

_READ_AS = {"float64": "float32", "bfloat16": "uint16"}
"""dtype in which values are passed to MLX."""


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor in a file.

    Attributes:
        shape: stored shape.
        dtype: stored dtype, by its name in numpy and MLX (`float32`, `bfloat16`, ...).
        load: reads it, float64 as float32; raises a WeightsError if MLX lacks the dtype.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], mx.array]


def width(dtype: str) -> int | None:
    """Bytes per value; None for an unknown dtype."""
    try:
        return np.dtype(_HELD_AS.get(dtype, dtype)).itemsize
    except TypeError:
        return None


def read_numbers(
    data: np.ndarray, name: str, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None
) -> mx.array:
    """Convert bytes of a file to an array.

    Args:
        data: uint8 (n,), from the first element of the tensor to at least its last.
        name: for messages.
        dtype, shape: those of the tensor.
        strides: in elements; None if contiguous.

    Raises:
        WeightsError: numpy lacks the dtype.
    """
    if (size := width(dtype)) is None:
        raise WeightsError(f"{name} is stored as {dtype}, which is not supported; save it as float32")
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
