"""Randomness as a function of (seed, stream, step, sample), without state to save or restore.

Resumed runs, any division into micro-batches and any number of processes get the same noise for the same sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import mlx.core as mx
import numpy as np


class Stream(IntEnum):
    """Purpose of a draw. Never renumber, only append: the values determine the results of a run."""

    INIT = 0
    DATA_ORDER = 1
    NOISE = 2
    CAPTION_DROPOUT = 3
    LORA_DROPOUT = 4
    CLASS_IMAGES = 5
    PREVIEW = 6
    AUGMENT = 7
    EVALUATION = 8
    HELD_OUT = 9
    DIGITS = 10


def sample_keys(seed: int, stream: Stream, step: int, samples: Iterable[int]) -> mx.array:
    """One MLX random key per sample.

    Returns:
        uint32 array (B, 2); row i depends only on (seed, stream, step, samples[i]).
    """
    rows = [np.random.SeedSequence([seed, int(stream), step, sample]).generate_state(2) for sample in samples]
    return mx.array(np.stack(rows))


def rng(seed: int, stream: Stream, *path: int) -> np.random.Generator:
    """A numpy generator that depends only on the given integers."""
    return np.random.default_rng(np.random.SeedSequence([seed, int(stream), *path]))
