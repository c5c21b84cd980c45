"""MLX and the device that it computes on. Importing this module prepares the process first (see `process`)."""

from __future__ import annotations

import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mflux_vae.errors import BackendError
from mflux_vae.runtime import cuda, process

_INSTALL = "pip install 'mflux-vae[cpu]' (or [cuda], [cuda12])"

blas: str | None = None
"""Path of the BLAS that was opened for MLX; None where MLX uses the one it came with."""

if process.tunes() and cuda.wheel() is None:
    blas, _ = process.open_blas()

try:
    import mlx.core as mx  # binds its BLAS symbols while it is imported
    from mlx.utils import tree_flatten
except ImportError as error:
    raise BackendError(f"MLX has no back end here ({error}); {cuda.import_cure(str(error)) or _INSTALL}") from error


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdigit()]


if _numbers(mx.__version__) < _numbers(process.OLDEST_MLX):  # type: ignore[attr-defined]
    raise BackendError(f"MLX {mx.__version__} is too old, {process.OLDEST_MLX} is needed; {_INSTALL}")  # type: ignore[attr-defined]

_warnings = [cuda.conflict(), *(cuda.prepare(mx, tune=process.tunes()) if mx.cuda.is_available() else ())]
for _message in filter(None, _warnings):
    warnings.warn(_message, RuntimeWarning, stacklevel=1)

GPU_DTYPE: mx.Dtype = mx.bfloat16
"""Dtype of denoisers and text encoders on Metal and CUDA, unless another one is asked for."""


class _Assumed(threading.local):
    cpu: bool | None = None  # for threads that assume nothing themselves


_assumed = _Assumed()


def is_cpu() -> bool:
    """Whether MLX computes on the CPU (no Metal, no CUDA, or the default device was set to the CPU)."""
    return mx.default_device().type == mx.DeviceType.cpu if _assumed.cpu is None else _assumed.cpu


@contextmanager
def assuming(cpu: bool) -> Iterator[None]:
    """Let `is_cpu` and `compute_dtype` answer for another machine in this thread. For estimates: compute nothing."""
    before, _assumed.cpu = _assumed.cpu, cpu
    try:
        yield
    finally:
        _assumed.cpu = before


DEVICES = {"cpu": "CPU", "mac": "Mac", "cuda": "NVIDIA GPU"}
"""Names of the answers of `kind`."""


def kind() -> str:
    """The device that MLX computes on here: "mac", "cuda" or "cpu"."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "mac" if mx.metal.is_available() else "cuda"


def compute_dtype(requested: mx.Dtype | None = None) -> mx.Dtype:
    """The dtype to compute in: float32 on a CPU, where half precision is thirty times slower, else what is asked for.

    On NVIDIA's cards without bfloat16 it is float32, too: float16 overflows in text encoders.

    Args:
        requested: wanted dtype; None means `GPU_DTYPE`.
    """
    dtype = mx.float32 if is_cpu() else (requested or GPU_DTYPE)
    return dtype if dtype != mx.bfloat16 or cuda.has_bfloat16(mx.device_info()) else mx.float32


def release_arrays(error: BaseException) -> None:
    """Let go of the arrays that functions which an error ended still hold in its traceback, and of MLX's cache."""
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__
    mx.clear_cache()


def eval_each(tree: Any) -> None:
    """Evaluate the arrays of a tree one by one.

    `mx.eval(tree)` computes every array on the way to one of them, such as weights before their conversion to another
    dtype, before the first array of the tree: all of those are in memory together.
    """
    arrays: dict[str, mx.array] = dict(tree_flatten(tree))
    for array in arrays.values():
        mx.eval(array)


def copy_with_cuda(array: mx.array) -> mx.array:
    """A copy in the memory of an NVIDIA card, bit for bit; on other devices the array itself.

    An array that comes from NumPy stays in the memory of the host, and under WSL each kernel reads it over the bus.
    """
    if kind() != "cuda":
        return array
    copy = mx.where(mx.array(True), array, array)
    mx.eval(copy)  # while `array` is in use, so that its memory cannot serve for the copy
    mx.clear_cache()  # of arrays before this one, whose memory others would get
    return copy


def _tune_for_cpu() -> None:
    global blas
    if not (process.tunes() and is_cpu()):
        return
    cure = ""
    if blas is None:
        blas, cure = process.open_blas()
    process.tune(mx)
    if blas is None:
        message = f"MLX has no fast BLAS: its matrix products are about 30 times slower on this CPU; cure: {cure}"
        warnings.warn(message, RuntimeWarning, stacklevel=1)


def use_cpu() -> None:
    """Compute on the CPU from now on."""
    if not is_cpu():
        mx.set_default_device(mx.cpu)
        _tune_for_cpu()


_tune_for_cpu()
