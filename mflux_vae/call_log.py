"""What the logger ``mflux_vae`` says at DEBUG: shapes at each stage, time and memory of each call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

from mflux_vae.posterior import DiagonalGaussian

log = logging.getLogger("mflux_vae")
"""DEBUG: shapes, seconds and memory. INFO: what was opened, and when a call is tiled. WARNING: a likely mistake."""

Result = TypeVar("Result", mx.array, DiagonalGaussian)


def known(*arrays: mx.array) -> bool:
    """Evaluates arrays; False while a transformation (compile, vmap) traces them and there are no values."""
    try:
        mx.eval(*arrays)
    except ValueError:
        return False
    return True


def reported(stage: str, given: mx.array, work: Callable[[mx.array], Result]) -> Result:
    """`work(given)`; at DEBUG evaluated at once and reported, which also starts MLX's peak of memory anew."""
    if not log.isEnabledFor(logging.DEBUG) or not known(given):
        return work(given)
    mx.reset_peak_memory()
    before, start = mx.get_active_memory(), time.perf_counter()
    result = work(given)
    arrays = [result] if isinstance(result, mx.array) else [result.mean, result.logvar]
    known(*arrays)
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory() - before
    log.debug("%s: %s -> %s, %.3f s, %.1f MB", stage, shape(given), shape(arrays[0]), seconds, peak / 1e6)
    return result


def shape(array: mx.array) -> str:
    """Such as `float32 (1, 4, 64, 64)`."""
    return f"{str(array.dtype).removeprefix('mlx.core.')} {tuple(array.shape)}"
