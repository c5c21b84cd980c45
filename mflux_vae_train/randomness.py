"""Randomness as a function of (seed, stream, step, sample): nothing to save, nothing to restore.

A generator with state would have to be stored in every checkpoint and would differ between one process and
several. Here every draw is named by integers, so a resumed run, a run split over micro-batches and a run on
several ranks all see the same noise for the same sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import mlx.core as mx
import numpy as np


class Stream(IntEnum):
    """What a draw is for. Values are part of a run's identity: never renumber, only append."""

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
        uint32 array (B, 2); row i depends on (seed, stream, step, samples[i]) alone.
    """
    rows = [np.random.SeedSequence([seed, int(stream), step, sample]).generate_state(2) for sample in samples]
    return mx.array(np.stack(rows))


def rng(seed: int, stream: Stream, *path: int) -> np.random.Generator:
    """A numpy generator that depends on the given integers alone."""
    return np.random.default_rng(np.random.SeedSequence([seed, int(stream), *path]))
