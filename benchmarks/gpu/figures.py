"""Shared by the sections: figures with their limits, errors, times, and the device that they are measured on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from benchmarks.harness.rows import Work
from mflux_vae.runtime import device

Figures: TypeAlias = Mapping[str, tuple[float, float]]
"""Name with unit -> (value, largest value that is claimed; NaN without a claim)."""

NONE = float("nan")
"""No claim."""


def section(figures: Callable[[], Figures]) -> Work:
    """Measure with the code for GPUs, also on a CPU."""

    def run() -> dict[str, np.ndarray]:
        with as_gpu():
            return {name: np.array(pair, np.float64) for name, pair in figures().items()}

    return Work(run=run)


def as_gpu() -> AbstractContextManager[None]:
    """Within the block, this project takes its code for Metal and CUDA."""
    return device.assuming(cpu=False) if device.is_cpu() else nullcontext()


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within the block, MLX and this project compute on the CPU: the reference."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        with device.assuming(cpu=True):
            yield
    finally:
        mx.set_default_device(before)


def rms_error(found: mx.array, exact: mx.array) -> float:
    """Root mean square of the difference, relative to the deviation of `exact`, in percent."""
    x, y = (np.array(array.astype(mx.float32), np.float64) for array in (found, exact))
    return float(100 * np.sqrt(np.square(x - y).mean()) / y.std())


def seconds(run: Callable[[], object], rounds: int = 3) -> float:
    """The fastest of some runs, after one that compiles; `run` returns arrays."""
    mx.eval(run())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return min(times)


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory beyond what was active before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return mx.get_peak_memory() - before
