"""Devices and dtypes. On a Linux CPU: a fast BLAS before MLX's first use, and a sane buffer cache.

MLX's CPU wheel for Linux links netlib's reference BLAS, thirty times slower than the machine can do. Its BLAS
symbols are unversioned, so a library that is already in the process's global scope wins: opening MKL (the `mkl`
wheel) or OpenBLAS (Debian's `libopenblas0`) with RTLD_GLOBAL before `mlx.core` is imported is all it takes, and
where MLX was imported first, its table of functions is rewritten (`rebind`).
Nothing here applies to Metal or CUDA.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path

from mflux_vae.rebind import rebind

BLAS_VARIABLE = "MFLUX_VAE_BLAS"
"""Environment variable: `auto` (default), `none`, or the path of a BLAS library with an unprefixed CBLAS interface."""

_MKL = "libmkl_rt.so"
_OPENBLAS = ("libopenblas.so.0", "libopenblas.so")
_CACHE_SHARE = 0.25


def _open_blas() -> str | None:
    """Open a fast BLAS with RTLD_GLOBAL, and bind MLX to it where `mlx.core` was imported before this package.

    Returns:
        path of the library; None where none is needed or none was found (then a warning names the cure).
    """
    if sys.platform != "linux":
        return None
    loaded = sys.modules.get("mlx.core")
    choice = os.environ.get(BLAS_VARIABLE, "auto")
    for candidate in [] if choice == "none" else _candidates() if choice == "auto" else [choice]:
        try:
            library = ctypes.CDLL(str(candidate), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if not hasattr(library, "cblas_sgemm"):
            continue
        if loaded is None:
            return str(candidate)
        libmlx = Path(str(loaded.__file__)).parent / "lib" / "libmlx.so"
        if libmlx.is_file() and rebind(ctypes.CDLL(str(libmlx)), "cblas_", library):
            return str(candidate)
        _warn("MLX is bound to its own slow BLAS already; cure: import mflux_vae before mlx")
        return None
    cure = "pip install mkl" if platform.machine() == "x86_64" else "apt install libopenblas0"
    _warn(f"no fast BLAS found: MLX is about 30 times slower on this CPU; cure: {cure}")
    return None


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _candidates() -> list[str | Path]:
    """MKL where pip put it, then whatever OpenBLAS the dynamic linker knows."""
    found: list[str | Path] = []
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found += [Path(str(file.locate())) for file in files if file.name.startswith(_MKL)]
    return [*found, *_OPENBLAS]


def _memory_bytes() -> int:
    """Physical memory, or the container's limit where that is smaller."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


blas = _open_blas()
"""Path of the BLAS in use; None on Metal, or where MLX's own is used."""

import mlx.core as mx  # noqa: E402  (binds its BLAS symbols while it is imported)


def is_cpu() -> bool:
    """Whether MLX computes on the CPU (no Metal, no CUDA, or the default device was set to the CPU)."""
    return mx.default_device().type == mx.DeviceType.cpu


def can_compile() -> bool:
    """Whether `mx.compile` works here: on a CPU it runs g++ when a function is first evaluated."""
    return not is_cpu() or shutil.which("g++") is not None


def compute_dtype(requested: mx.Dtype | None = None) -> mx.Dtype:
    """The dtype to compute in: float32 on a CPU, where half precision is thirty times slower, else what is asked for.

    Args:
        requested: wanted dtype; None means bfloat16.
    """
    return mx.float32 if is_cpu() else (requested or mx.bfloat16)


if is_cpu():
    # The default of 32 MB makes every large temporary a fresh mmap that page-faults: nine times slower.
    mx.set_cache_limit(int(_memory_bytes() * _CACHE_SHARE))
