"""What importing this package changes in the process, on Linux.

Set `MFLUX_VAE_TUNE=0` to leave the process as it is. With CUDA it sets the variables of `cuda`, and on a CPU:

| change | why | gain | override |
|---|---|---|---|
| a fast BLAS for MLX | MLX's wheel links netlib's reference BLAS | 39x | `MFLUX_VAE_BLAS` |
| `KMP_BLOCKTIME=0` | MKL's idle threads spin for 0.2 s on busy cores | 1.15x CPU, 0.9x wall | the variable |
| `mallopt` | glibc returns freed blocks, and the system zeroes pages | 1.7x | `MALLOC_*`, `GLIBC_TUNABLES` |
| `mx.set_cache_limit` | with 32 MB every large temporary is a new mapping | none beside `mallopt` | call it later |
| `mx.set_memory_limit`, without the native extension | MLX allocates 100 operations ahead | memory | call it before |

Gains: seconds without the change over seconds with it, encoding and decoding 128 x 128 pixels with Stable Diffusion's
autoencoder on two busy cores of an AMD EPYC, alternating runs; the BLAS on an Intel Xeon (`python -m benchmarks`).
MLX's `MLX_BFS_MAX_WIDTH` stays at its default: 1000 trained `tiny` 1.17 times slower, with 41.9 instead of 38.7 MB.

The BLAS symbols of MLX are unversioned, so a library that is already in the process's global scope wins: opening MKL
(the `mkl` wheel) or OpenBLAS (Debian's `libopenblas0`) with RTLD_GLOBAL before `mlx.core` is imported is enough. Where
MLX was imported first, its table of functions is rewritten (`elf.rebind`).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from mflux_vae.runtime.elf import rebind

OLDEST_MLX = "0.32.2"
"""As in pyproject.toml."""

TUNE_VARIABLE = "MFLUX_VAE_TUNE"
"""Environment variable: `0` leaves the process as it is, the BLAS of MLX included."""

BLAS_VARIABLE = "MFLUX_VAE_BLAS"
"""Environment variable: `auto` (default), `none`, or the path of a BLAS library with an unprefixed CBLAS interface."""

_MKL = "libmkl_rt.so"
_OPENBLAS = ("libopenblas.so.0", "libopenblas.so")
_CBLAS = "cblas_"
_CACHE_SHARE = 0.25
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_FROM_HEAP, _MOST_KEPT_FREE = 32 << 20, 1 << 30


def tunes() -> bool:
    """Whether this process may be changed: on Linux, unless the user forbids it."""
    return sys.platform == "linux" and os.environ.get(TUNE_VARIABLE, "1") != "0"


def launched_rank() -> int | None:
    """Number of this process among those of a launcher, MLX's or MPI's, found without MLX; None without a launcher."""
    ranks = (os.environ.get(name, "") for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    return next((int(rank) for rank in ranks if rank.isdigit()), None)


def open_blas() -> tuple[str | None, str]:
    """Open a fast BLAS with RTLD_GLOBAL, and bind MLX to it where `mlx.core` was imported before.

    Returns:
        path of the library, or None; and what the user can do in that case.
    """
    os.environ.setdefault("KMP_BLOCKTIME", "0")
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
            if imported is None or rebind(libmlx(imported), _CBLAS, library):
                return str(candidate), ""
            cure = "import mflux_vae before mlx"
        except OSError:
            continue
    return None, cure


def _candidates(choice: str) -> list[str | Path]:
    """Libraries to try, best first: MKL where pip put it, then the OpenBLAS that the dynamic linker knows."""
    if choice != "auto":
        return [] if choice == "none" else [choice]
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return [*(Path(str(file.locate())) for file in files if file.name.startswith(_MKL)), *_OPENBLAS]


def libmlx(core: object) -> ctypes.CDLL:
    """Open MLX's library: beside its extension module, or the extension itself."""
    extension = Path(str(getattr(core, "__file__", None)))
    library = extension.parent / "lib" / "libmlx.so"
    return ctypes.CDLL(str(library if library.is_file() else extension))


def tune(core: Any) -> None:
    """Apply what does not have to come before the import of `mlx.core`, which is given."""
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if not chosen and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_FREE)
    core.set_cache_limit(int(memory_bytes() * _CACHE_SHARE))


def memory_bytes() -> int:
    """Physical memory, or the container's limit where that is smaller."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
