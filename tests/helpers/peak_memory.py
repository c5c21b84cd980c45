"""The memory that a call takes."""

from __future__ import annotations

import gc
from collections.abc import Callable

import mlx.core as mx


def peak_of(call: Callable[[], object]) -> int:
    """Bytes at the most, besides those that are there before, until what a call returns is computed.

    What others left behind goes first: were it collected meanwhile, the call would seem to take less.
    """
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(call())
    return mx.get_peak_memory() - before
