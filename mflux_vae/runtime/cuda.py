"""MLX's CUDA back end: variables that it reads at its first operation, and installations and cards that cannot work.

Read from MLX's source (0.32): its caches of convolutions (128) and graphs (400) end the process with "Cache thrashing"
after twice as many misses, which never expire. An autoencoder has about 13 convolutions for each size of an image, and
an update of FLUX some 500 graphs. Compiled kernels are kept in a folder of the system's temporary files, in place and
by name: users, generations of cards and processes that start together would read each other's, also unfinished ones.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mflux_vae.errors import BackendError
from mflux_vae.runtime.process import launched_rank

CPU_WHEEL = "mlx-cpu"
DRIVERS = {"mlx-cuda-13": "580", "mlx-cuda-12": "550"}
"""Wheels of MLX, and the oldest driver that each works with."""

VARIABLES = {
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
    "MLX_CUDA_CONV_CACHE_SIZE": "1024",
    "MLX_CUDA_GRAPH_CACHE_SIZE": "2048",
}
"""Variables of MLX and their values here, unless they are set."""

KERNELS_VARIABLE = "MLX_PTX_CACHE_DIR"
"""Variable of MLX: folder of the kernels that it compiled on this machine."""

_ON_CPU = f"for the CPU: pip uninstall -y {' '.join(DRIVERS)} {CPU_WHEEL} && pip install 'mflux-vae[cpu]'"
_OLDEST, _WITH_BFLOAT16 = (7, 5), (8, 0)
_LEFT_OUT = ((10, 3), (11, 0))
"""Compute capabilities that MLX's wheels have no kernels for, beside older ones."""


def _version(wheel: str) -> str | None:
    try:
        return importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return None


def wheel() -> str | None:
    """Name of the installed wheel of MLX for CUDA, found without importing it."""
    return next((name for name in DRIVERS if _version(name)), None)


def conflict() -> str | None:
    """A warning if several back ends are installed: each has a file libmlx.so, and the last one replaced the others."""
    found = [name for name in (*DRIVERS, CPU_WHEEL) if _version(name)]
    if len(found) < 2:
        return None
    kept, *others = found
    return f"{kept} and {' '.join(others)} replace each other's files; {_reinstalled(kept, others)}; {_ON_CPU}"


def _reinstalled(kept: str, others: Sequence[str] = ()) -> str:
    first = f"pip uninstall -y {' '.join(others)} && " if others else ""
    return f"for the GPU: {first}pip install --force-reinstall --no-deps {kept}=={_version(kept)}"


def import_cure(error: str) -> str | None:
    """What to do about an ImportError of MLX; None if it has nothing to do with CUDA."""
    if (found := wheel()) is None:
        return None
    if "libcuda.so" in error:
        return f"there is no NVIDIA driver; install {DRIVERS[found]} or newer; {_ON_CPU}"
    return f"{_reinstalled(found)}; {_ON_CPU}" if "libmlx.so" in error else None


def prepare(core: Any, *, tune: bool) -> list[str]:
    """Set the variables, and look at the card. MLX may be imported, but must not have computed anything.

    Args:
        core: `mlx.core` with its CUDA back end.
        tune: whether to set variables.

    Returns:
        warnings.

    Raises:
        BackendError: MLX cannot compute here, not even on the CPU.
    """
    if core.device_count(core.gpu) == 0:
        raise BackendError(f"MLX for CUDA finds no NVIDIA GPU: {_why_none()}; {_ON_CPU}")
    info = core.device_info(core.gpu)
    if tune:
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)
        _keep_kernels(core.__version__, info["architecture"])
    return [text for text in (_card_warning(info), _wsl_warning()) if text is not None]


def _why_none() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and launched_rank() is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible}; start one process for each GPU (mlx.launch -n)"
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible or 'empty'}"
    return f"see nvidia-smi; the extra cuda needs driver {DRIVERS['mlx-cuda-13']}, cuda12 {DRIVERS['mlx-cuda-12']}"


def _keep_kernels(version: str, architecture: str) -> None:
    """Set `KERNELS_VARIABLE`. Without a home that can be written MLX uses its folder of temporary files."""
    if KERNELS_VARIABLE in os.environ:
        return
    with suppress(OSError, RuntimeError):
        folder = kernels_folder(version, architecture)
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ[KERNELS_VARIABLE] = str(folder)


def kernels_folder(version: str, architecture: str) -> Path:
    """Folder for compiled kernels of this user, MLX, kind of card and, where several start together, process."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mflux-vae" / "kernels" / version / architecture / str(launched_rank() or 0)


def capability(info: Mapping[str, Any]) -> tuple[int, int] | None:
    """Compute capability in `mx.device_info()`; None of other devices."""
    if "compute_capability_major" not in info:
        return None
    return int(info["compute_capability_major"]), int(info["compute_capability_minor"])


def has_bfloat16(info: Mapping[str, Any]) -> bool:
    """Whether a device computes in bfloat16: all but NVIDIA's before Ampere, for which MLX lacks its products."""
    return (capability(info) or _WITH_BFLOAT16) >= _WITH_BFLOAT16


def _card_warning(info: Mapping[str, Any]) -> str | None:
    found = capability(info)
    if found is None or wheel() is None:  # built from its source, for this card
        return None
    card = f"{info.get('device_name', 'this GPU')} (compute capability {found[0]}.{found[1]})"
    if found < _OLDEST:
        raise BackendError(f"MLX has no kernels for {card}, {_OLDEST[0]}.{_OLDEST[1]} is needed; {_ON_CPU}")
    if found in _LEFT_OUT:
        return f"MLX's wheels have no kernels for {card}; after an error 'no kernel image' build MLX from its source"
    if not has_bfloat16(info):
        return f"{card} lacks bfloat16, so networks compute in float32 with twice the memory; 8.0 or newer has it"
    return None


def _wsl_warning() -> str | None:
    if "microsoft" not in platform.release().lower():
        return None
    return "under WSL arrays that come from NumPy stay in the memory of the host, and the GPU is slow; use Linux itself"
