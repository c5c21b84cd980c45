"""The native extension for Linux CPUs: `_native`, if it was built for this MLX and this processor can run it.

`MFLUX_VAE_NATIVE=0` switches it off. Without it, `mflux_vae.kernels` uses MLX's operations.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

from mflux_vae.runtime import device

VARIABLE = "MFLUX_VAE_NATIVE"

_logger = logging.getLogger(__name__)


def native() -> Any | None:
    """The module of the extension if MLX computes on a CPU and the extension can be used, else None."""
    return _module() if device.is_cpu() else None


@cache
def _module() -> Any | None:
    module, reason = _load()
    if reason:
        _logger.info("computing with MLX's operations, which are slower on a CPU: %s", reason)
    return module


def _load() -> tuple[Any | None, str]:
    """The module, or None and a reason with what to do."""
    if os.environ.get(VARIABLE) == "0":
        return None, f"{VARIABLE} is 0"
    try:
        from mflux_vae.kernels.cpu import _native  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"no native extension ({error}); install a C++ compiler and then this package again"
    return _native, ""
