"""Features of many inputs, a few at a time, normalised to length 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

BATCH = 16
"""Inputs that a network takes at a time, which bounds its memory."""


def in_batches(network: Callable[[Sequence[Any]], mx.array], inputs: Sequence[Any], width: int) -> np.ndarray:
    """Inputs -> rows of length 1, float32 (N, width).

    Args:
        network: inputs -> (n, width).
    """
    rows = [np.zeros((0, width), np.float32)]
    for start in range(0, len(inputs), BATCH):
        rows.append(np.array(network(inputs[start : start + BATCH]).astype(mx.float32)))
        mx.clear_cache()
    return normalized(np.concatenate(rows))


def normalized(features: np.ndarray) -> np.ndarray:
    """Rows divided by their lengths."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)
