"""The native extension for Linux CPUs: `_native`, if it was built for this MLX and this processor can run it.

Without it, `mflux_vae.kernels` uses MLX's operations. The environment variable MFLUX_VAE_NATIVE restricts the choice:
`0` switches the extension off, `avx2` keeps it from using AVX-512.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import sys
from functools import cache
from typing import Any

import mlx.core as mx

from mflux_vae.runtime import device, process

VARIABLE = "MFLUX_VAE_NATIVE"
MLX = "0.32.4"
"""The version that pyproject.toml builds the extension for. Loading it beside another one may crash."""

API = 2
"""As in bindings.cpp. Both change with the functions there, as an editable installation may hold an older extension."""
FREE_RUNNING = 256 << 20
"""Bytes in use from which MLX alone waits for earlier operations on a CPU; it allocates up to 100 of them ahead."""

_DEFAULT_LIMIT = 0.79
"""Share of the memory that MLX's default limit, four fifths of it, exceeds."""

_logger = logging.getLogger(__name__)


def native() -> Any | None:
    """The module of the extension if MLX computes on a CPU and the extension can be used, else None."""
    return _module() if device.is_cpu() and _on_cpu() else None


def native_expected() -> bool:
    """Whether estimates are for a CPU with the extension, which they assume of another machine."""
    return device.is_cpu() and (not _on_cpu() or native() is not None)


def _on_cpu() -> bool:
    """Whether MLX computes on the CPU, also while estimates assume another device."""
    return mx.default_device().type == mx.DeviceType.cpu


@cache
def _module() -> Any | None:
    if (choice := os.environ.get(VARIABLE)) not in (None, "", "0", "1", "avx2"):
        _logger.warning("%s=%s is unknown and ignored; set it to 0 or avx2", VARIABLE, choice)
    if os.environ.get(VARIABLE) == "0":
        reason = f"{VARIABLE} is 0; unset it"
    elif sys.platform != "linux" or platform.machine() != "x86_64":
        reason = "the native extension is for Linux on x86-64"
    elif mx.__version__ != MLX:  # type: ignore[attr-defined]
        reason = f"the native extension is for MLX {MLX}, this is {mx.__version__}; install mlx[cpu]=={MLX}"  # type: ignore[attr-defined]
    else:
        try:
            module = importlib.import_module("mflux_vae.kernels.cpu._native")
            if getattr(module, "API", None) == API:
                return module
            reason = "the native extension is older or newer than this package; install this package again"
        except ModuleNotFoundError:
            reason = "the native extension is not built; install g++, then this package again"
        except ImportError as error:
            reason = f"the native extension cannot be loaded ({error}); install this package again"
    _logger.info("computing with MLX's operations, which are slower on a CPU: %s", reason)
    if process.tunes() and not (mx.metal.is_available() or mx.cuda.is_available()):
        before = mx.set_memory_limit(FREE_RUNNING)
        if before < _DEFAULT_LIMIT * process.memory_bytes():  # the caller's
            mx.set_memory_limit(before)
    return None
