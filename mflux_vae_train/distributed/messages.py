"""Arrays of any shapes and dtypes as the bytes of one message, and back, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import mlx.core as mx

ALIGNMENT = 16
"""Each array begins at a multiple of this many bytes, so that it can be viewed as any dtype."""

Spec: TypeAlias = tuple[Sequence[int], str]
"""Shape and dtype of an array, as plain JSON."""


def spec_of(array: mx.array) -> Spec:
    return array.shape, str(array.dtype).removeprefix("mlx.core.")


def padded_size(spec: Spec) -> int:
    """Bytes that an array takes in a message."""
    return -(-_size(spec) // ALIGNMENT) * ALIGNMENT


def pack(array: mx.array) -> mx.array:
    """(n,) uint8. Sums of bytes are exact, while in floats -0.0 + 0.0 is not -0.0."""
    spec = spec_of(array)
    return mx.pad(array.reshape(-1).view(mx.uint8), (0, padded_size(spec) - _size(spec)))


def unpack(message: mx.array, specs: Sequence[Spec]) -> list[mx.array]:
    """The arrays of a message, (n,) uint8, that begins with the `pack` of each."""
    starts = accumulate(map(padded_size, specs), initial=0)
    return [
        message[start : start + _size(spec)].view(_dtype(spec)).reshape(spec[0])
        for start, spec in zip(starts, specs, strict=False)
    ]


def _dtype(spec: Spec) -> mx.Dtype:
    dtype: mx.Dtype = getattr(mx, {"bool": "bool_"}.get(spec[1], spec[1]))
    return dtype


def _size(spec: Spec) -> int:
    return math.prod(spec[0]) * _dtype(spec).size
