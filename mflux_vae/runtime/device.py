"""Devices and dtypes. On a Linux CPU: a fast BLAS before MLX's first use, and a sane buffer cache.

MLX's CPU wheel for Linux links netlib's reference BLAS, thirty times slower than the machine can do. Its BLAS
symbols are unversioned, so a library that is already in the process's global scope wins: opening MKL (the `mkl`
wheel) or OpenBLAS (Debian's `libopenblas0`) with RTLD_GLOBAL before `mlx.core` is imported is all it takes, and
where MLX was imported first, its table of functions is rewritten (`rebind`).
Metal and CUDA compute without it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mflux_vae.runtime.elf import rebind

BLAS_VARIABLE = "MFLUX_VAE_BLAS"
"""Environment variable: `auto` (default), `none`, or the path of a BLAS library with an unprefixed CBLAS interface."""

_MKL = "libmkl_rt.so"
_OPENBLAS = ("libopenblas.so.0", "libopenblas.so")
_CBLAS = "cblas_"
_CACHE_SHARE = 0.25
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_FROM_HEAP, _MOST_KEPT_FREE = 32 << 20, 1 << 30


def _open_blas() -> tuple[str | None, str]:
    """Open a fast BLAS with RTLD_GLOBAL, and bind MLX to it where `mlx.core` was imported before this package.

    Returns:
        path of the library, or None; and what the user can do in that case.
    """
    imported = sys.modules.get("mlx.core")
    choice = os.environ.get(BLAS_VARIABLE, "auto")
    cure = "pip install mkl" if platform.machine() == "x86_64" else "apt install libopenblas0"
    if choice != "auto":
        cure = f"unset {BLAS_VARIABLE} (now {choice!r}), {cure}"
    for candidate in _candidates(choice):
        try:
            library = ctypes.CDLL(str(candidate), mode=ctypes.RTLD_GLOBAL)
            if not hasattr(library, f"{_CBLAS}sgemm"):
                continue
            if imported is None or rebind(_libmlx(imported), _CBLAS, library):
                return str(candidate), ""
            cure = "import mflux_vae before mlx"
        except OSError:
            continue
    return None, cure


def _candidates(choice: str) -> list[str | Path]:
    """What to try, best first: MKL where pip put it, then whatever OpenBLAS the dynamic linker knows."""
    if choice != "auto":
        return [] if choice == "none" else [choice]
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return [*(Path(str(file.locate())) for file in files if file.name.startswith(_MKL)), *_OPENBLAS]


def _libmlx(core: object) -> ctypes.CDLL:
    """MLX's library: beside its extension module, or the extension itself."""
    extension = Path(str(getattr(core, "__file__", None)))
    library = extension.parent / "lib" / "libmlx.so"
    return ctypes.CDLL(str(library if library.is_file() else extension))


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks, as far as it lets itself be told, instead of giving each back to the system.

    The system zeroes what it hands out again, a page at a time: on virtual machines half a second of page faults for
    each second of computing. A choice of the user's own stands.
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not told and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_FREE)


def _memory_bytes() -> int:
    """Physical memory, or the container's limit where that is smaller."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


if sys.platform == "linux":
    # MKL's threads otherwise look for work for 0.2 s after each product, on cores that others would use.
    os.environ.setdefault("KMP_BLOCKTIME", "0")

blas, _cure = _open_blas() if sys.platform == "linux" else (None, "")
"""Path of the BLAS that was opened for MLX; None where MLX uses the one it came with."""

import mlx.core as mx  # noqa: E402  (binds its BLAS symbols while it is imported)
from mlx.utils import tree_flatten  # noqa: E402


def is_cpu() -> bool:
    """Whether MLX computes on the CPU (no Metal, no CUDA, or the default device was set to the CPU)."""
    return mx.default_device().type == mx.DeviceType.cpu


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_BLAS_THREADS = (
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
)


_telling = threading.Lock()
_told: list[int] = []
"""What was before, once for each caller that is within `one_blas_thread`."""


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let a matrix product use one thread, where the BLAS that was opened here can be told; callers have their own."""
    library = ctypes.CDLL(blas) if blas is not None else None
    get, tell = next((names for names in _BLAS_THREADS if hasattr(library, names[0])), (None, None))
    if get is None or tell is None:
        yield
        return
    with _telling:
        _told.append(_told[0] if _told else getattr(library, get)())
        getattr(library, tell)(1)
    try:
        yield
    finally:
        with _telling:
            before = _told.pop()
            if not _told:
                getattr(library, tell)(before)


def compute_dtype(requested: mx.Dtype | None = None) -> mx.Dtype:
    """The dtype to compute in: float32 on a CPU, where half precision is thirty times slower, else what is asked for.

    Args:
        requested: wanted dtype; None means bfloat16.
    """
    return mx.float32 if is_cpu() else (requested or mx.bfloat16)


def eval_each(tree: Any) -> None:
    """Evaluate the arrays of a tree one by one.

    `mx.eval(tree)` computes every array on the way to one of them, such as weights before their conversion to another
    dtype, before the first array of the tree: all of those are in memory together.
    """
    arrays: dict[str, mx.array] = dict(tree_flatten(tree))
    for array in arrays.values():
        mx.eval(array)


if sys.platform == "linux" and is_cpu():
    # Wider graphs MLX computes depth first, and so what is meant for one core after all that is meant for another.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")
    _keep_freed_memory()
    # The default of 32 MB makes every large temporary a fresh mmap that page-faults: nine times slower.
    mx.set_cache_limit(int(_memory_bytes() * _CACHE_SHARE))
    if blas is None:
        _message = f"MLX has no fast BLAS and is about 30 times slower on this CPU; cure: {_cure}"
        warnings.warn(_message, RuntimeWarning, stacklevel=1)
