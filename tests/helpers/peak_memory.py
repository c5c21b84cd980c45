"""Peak memory of a call."""

from __future__ import annotations

import gc
from collections.abc import Callable

import mlx.core as mx


def peak_of(call: Callable[[], object]) -> int:
    """Peak bytes beyond those allocated before, while a call runs and its result is evaluated.

    Collects garbage first, which would otherwise be subtracted.
    """
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(call())
    return mx.get_peak_memory() - before
