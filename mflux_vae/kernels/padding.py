"""Zero padding of images."""

from __future__ import annotations

from typing import TypeAlias

import mlx.core as mx

Sides: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
"""((top, bottom), (left, right))."""

Padding: TypeAlias = int | Sides


def normalize_padding(padding: Padding) -> Sides:
    """Expand a single number to all four sides."""
    return ((padding, padding),) * 2 if isinstance(padding, int) else padding


def zero_pad(x: mx.array, sides: Sides) -> mx.array:
    """Pad (B, H, W, C) with zeros."""
    return mx.pad(x, [(0, 0), *sides, (0, 0)]) if any(map(any, sides)) else x
