"""DEBUG records of the logger ``mflux_vae``: shapes, time and memory of each call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

from mflux_vae.posterior import DiagonalGaussian

log = logging.getLogger("mflux_vae")
"""DEBUG: shapes, seconds, memory. INFO: opened models, tiled calls. WARNING: likely mistakes."""

Result = TypeVar("Result", mx.array, DiagonalGaussian)


def evaluated(*arrays: mx.array) -> bool:
    """Evaluate arrays. False inside a transformation (compile, vmap), where arrays have no values."""
    try:
        mx.eval(*arrays)
    except ValueError:
        return False
    return True


def logged(stage: str, x: mx.array, work: Callable[[mx.array], Result]) -> Result:
    """Return `work(x)`. At level DEBUG evaluate and log it, which resets MLX's peak memory."""
    if not log.isEnabledFor(logging.DEBUG) or not evaluated(x):
        return work(x)
    mx.reset_peak_memory()
    before, start = mx.get_active_memory(), time.perf_counter()
    result = work(x)
    arrays = [result] if isinstance(result, mx.array) else [result.mean, result.logvar]
    evaluated(*arrays)
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory() - before
    log.debug("%s: %s -> %s, %.3f s, %.1f MB", stage, shape(x), shape(arrays[0]), seconds, peak / 1e6)
    return result


def shape(array: mx.array) -> str:
    """Format dtype and shape: "float32 (1, 4, 64, 64)"."""
    return f"{str(array.dtype).removeprefix('mlx.core.')} {tuple(array.shape)}"
