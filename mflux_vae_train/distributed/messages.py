"""Arrays of any shapes and dtypes as the bytes of one message, to the bit, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import mlx.core as mx

ALIGNED = 16
"""Bytes, at a multiple of which each array begins."""

Form: TypeAlias = tuple[Sequence[int], str]
"""Shape and dtype of an array, in plain JSON."""


def form_of(array: mx.array) -> Form:
    """What `split` must know of an array."""
    return array.shape, str(array.dtype).removeprefix("mlx.core.")


def _dtype(form: Form) -> mx.Dtype:
    found: mx.Dtype = getattr(mx, {"bool": "bool_"}.get(form[1], form[1]))
    return found


def _bytes(form: Form) -> int:
    """Of its content."""
    return math.prod(form[0]) * _dtype(form).size


def room_of(form: Form) -> int:
    """Bytes that it takes in a message: what follows begins where any dtype may."""
    return -(-_bytes(form) // ALIGNED) * ALIGNED


def as_bytes(array: mx.array) -> mx.array:
    """(n,) uint8, to the bit: in floats, -0.0 plus another process's 0.0 would not be -0.0."""
    form = form_of(array)
    return mx.pad(array.reshape(-1).view(mx.uint8), (0, room_of(form) - _bytes(form)))


def split(content: mx.array, forms: Sequence[Form]) -> list[mx.array]:
    """The arrays of a message, (n,) uint8, which begins with `as_bytes` of each."""
    starts = accumulate(map(room_of, forms), initial=0)
    return [
        content[start : start + _bytes(form)].view(_dtype(form)).reshape(form[0])
        for start, form in zip(starts, forms, strict=False)
    ]
