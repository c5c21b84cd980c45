"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from mflux_vae import runtime


def describe() -> str:
    """Processor, cores, system, and versions, in one line."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm", "numpy"))
    device = "CPU" if runtime.is_cpu() else "GPU"
    blas = os.path.basename(runtime.blas) if runtime.blas else "MLX's own"
    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"{versions}, {device}, BLAS {blas}"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
