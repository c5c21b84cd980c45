"""MLX's memory limits on Metal and CUDA: those of a run, and what the device has left.

Unless limited, MLX keeps freed buffers until it holds 95 % of what the device has, so a run that needs 10 GB takes the
memory of other programs. On Metal it wires nothing: the system may compress or page out the weights of a model that is
nearly as large as the memory. All this is from MLX's source, and was not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx

from mflux_vae.runtime import device

DEFAULT_CACHE, LEAST_CACHE = 4 << 30, 1 << 30
"""Bytes of freed buffers that MLX keeps: without an estimate, and at least."""

WIRED_SHARE, WIRED_MARGIN = 0.5, 2 << 30
"""A run whose peak exceeds this share of the recommended working set is wired, with so many further bytes."""

_CUDA_SHARE, _CUDA_RESERVE = 0.95, 500_000_000
"""Share of a CUDA device that MLX allocates at most, and bytes left to the context and to kernels."""


@contextmanager
def limited(*, peak: int | None = None, work: int | None = None) -> Iterator[None]:
    """Within the block, limit the cache of freed buffers, and on Metal wire the memory of a large model.

    A caller's lower cache limit and higher wired limit stay. On a CPU nothing changes.

    Args:
        peak, work: estimated bytes of the run, and those of them that are not weights; None if unknown.
    """
    if device.is_cpu():
        yield
        return
    with ExitStack() as stack:
        _set(stack, mx.set_cache_limit, DEFAULT_CACHE if work is None else max(work, LEAST_CACHE), min)
        if device.kind() == "mac" and peak is not None:
            recommended = int(mx.device_info()["max_recommended_working_set_size"])
            if peak > WIRED_SHARE * recommended:
                _set(stack, mx.set_wired_limit, min(peak + WIRED_MARGIN, recommended), max)
        yield


def free_bytes() -> int:
    """Bytes of a Metal or CUDA device that this process may still allocate; MLX's cache counts as free.

    On Metal this includes memory that other programs use; on CUDA theirs is subtracted.
    """
    info, active = mx.device_info(), mx.get_active_memory()
    if "free_memory" not in info:
        total = info.get("max_recommended_working_set_size") or info.get("total_memory") or info["memory_size"]
        return max(int(total) - active, 0)
    unused = int(info["free_memory"]) + mx.get_cache_memory()
    return max(min(unused, int(_CUDA_SHARE * int(info["total_memory"])) - active) - _CUDA_RESERVE, 0)


def _set(stack: ExitStack, set_limit: Callable[[int], int], limit: int, choose: Callable[[int, int], int]) -> None:
    """Set the chosen one of the present limit, which `stack` restores, and another."""
    before = set_limit(limit)
    stack.callback(set_limit, before)
    set_limit(choose(before, limit))
