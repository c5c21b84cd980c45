"""A tensor in a file that is loaded on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from mflux_vae.errors import WeightsError
from mflux_vae.runtime.device import copy_with_cuda
from mflux_vae.utils.formatting import shortened

MAX_DIMENSION_SIZE = 2**31 - 1
"""MLX uses 32-bit sizes."""

MAX_DIMENSIONS = 64
"""Limit of numpy."""

FP8 = ("f8_e4m3", "f8_e5m2")
"""8-bit floats, by the names of safetensors: 4 bits of exponent without infinities (torch's float8_e4m3fn), or 5."""

_HELD_AS = {"bfloat16": "uint16", **dict.fromkeys(FP8, "uint8")}
"""numpy dtype with the bits of a dtype that numpy lacks."""

_READ_AS = {**_HELD_AS, "float64": "float32"}
"""dtype in which values are passed to MLX."""


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor in a file.

    Attributes:
        shape: stored shape.
        dtype: stored dtype, by its name in numpy and MLX (`float32`, `bfloat16`, ...).
        load: reads it, float64 as float32, 8-bit floats as bfloat16; raises a WeightsError for an unsupported dtype.
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


def decode_fp8(bits: mx.array, dtype: str) -> mx.array:
    """Bits of 8-bit floats (uint8) -> their values, which bfloat16 holds exactly.

    Args:
        dtype: one of `FP8` (arXiv:2209.05433).
    """
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "f8_e5m2":
        values = (codes << 8).view(np.float16).astype(np.float32)
    else:
        exponents, mantissas = codes.astype(np.int32) >> 3 & 15, (codes & 7).astype(np.float32)
        values = np.where(exponents == 0, np.ldexp(mantissas, -9), np.ldexp(8 + mantissas, exponents - 10))
        values = np.where((codes & 127) == 127, np.nan, np.where(codes < 128, values, -values))
    return mx.array(values.astype(np.float32)).astype(mx.bfloat16)[bits]


def read_numbers(
    data: np.ndarray, name: str, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None
) -> mx.array:
    """Convert bytes of a file to an array.

    Args:
        data: uint8 (n,), from the first element of the tensor to at least its last.
        name: for messages, with the file.
        dtype, shape: those of the tensor.
        strides: in elements; None if contiguous.

    Raises:
        WeightsError: numpy lacks the dtype.
    """
    if (size := width(dtype)) is None:
        raise WeightsError(f"{name} is stored as {dtype}, which is not supported; save the weights as bfloat16")
    kind = np.dtype(_HELD_AS.get(dtype, dtype))
    if not prod(shape):
        view = np.empty(shape, kind)
    elif strides is None:
        view = data[: prod(shape) * size].view(kind).reshape(shape)
    else:
        numbers = data[: len(data) // size * size].view(kind)
        view = np.lib.stride_tricks.as_strided(numbers, shape, [size * stride for stride in strides])
    loaded = copy_with_cuda(mx.array(np.require(view, _READ_AS.get(dtype, dtype), ["C", "ALIGNED"])))
    if dtype in FP8:
        return decode_fp8(loaded, dtype)
    return loaded.view(mx.bfloat16) if dtype == "bfloat16" else loaded


def check_numbers(tensors: Mapping[str, mx.array], where: str, what: str) -> None:
    """Check that tensors hold finite floating-point numbers. Reads their values.

    Args:
        where, what: file, and what its tensors are, for messages.

    Raises:
        WeightsError: whole numbers, booleans or complex numbers, or values that are NaN or infinite.
    """
    for key, tensor in tensors.items():
        if not mx.issubdtype(tensor.dtype, mx.floating):
            dtype = str(tensor.dtype).removeprefix("mlx.core.")
            raise WeightsError(f"{where}: {shortened(key, 100)} is {dtype}, and {what} are floats; save it as float32")
    for key, tensor in tensors.items():
        if not mx.all(mx.isfinite(tensor)):
            raise WeightsError(f"{where}: {shortened(key, 100)} has values that are NaN or infinite; take another file")
