"""Description of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from mflux_vae.runtime import device


def describe() -> str:
    """Processor, cores, system and versions in one line."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm", "numpy"))
    kind = "CPU" if device.is_cpu() else "GPU"
    blas = os.path.basename(device.blas) if device.blas else "MLX's own"
    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"{versions}, {kind}, BLAS {blas}"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
