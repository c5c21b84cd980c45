"""How much memory there is, and how a call is therefore tiled; `peak_bytes` says how much it takes (`estimate`)."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.runtime.device import is_cpu
from mflux_vae.tiling.peak_memory import VECTORS_ERROR
from mflux_vae.tiling.peak_memory import peak_bytes as peak_bytes
from mflux_vae.tiling.tiles import Tiling
from mflux_vae.utils.formatting import size_text

logger = logging.getLogger("mflux_vae")

TilingOption: TypeAlias = bool | Literal["exact", "blend"] | Tiling | None
SMALLEST_TILE = 128


def plan(
    network: nn.Module,
    operation: Literal["encode", "decode"],
    batch: int,
    height: int,
    width: int,
    option: TilingOption = None,
) -> Tiling | None:
    """Decide how a call is tiled; None for not at all.

    Args:
        network: what encodes or decodes.
        what: which of both.
        batch, height, width: images, and their size in pixels.
        asked: None tiles when memory is short, in exact mode with the largest tile of 512, 256 and 128 that fits, or
            blended where none does; False never tiles; True and "exact" give the result of the untiled call, "blend"
            its blended tiles, all with tiles of 512 pixels; or a `Tiling`.

    Raises:
        SettingsError: asked for something else, or for tiles of a network whose latents are vectors.
    """
    if network.config.vectors:
        if option:
            raise SettingsError(VECTORS_ERROR)
        return None
    if isinstance(option, Tiling):
        return option
    if option is None:
        return _fit_to_memory(network, operation, batch, height, width)
    if option is False:
        return None
    if option is True or option == "exact":
        return Tiling("exact")
    if option == "blend":
        return Tiling("blend")
    raise SettingsError(f"tiling is None, False, True, 'exact', 'blend' or a Tiling, not {option!r}")


def _fit_to_memory(
    network: nn.Module, operation: Literal["encode", "decode"], batch: int, height: int, width: int
) -> Tiling | None:
    available = available_bytes()
    try:
        untiled = peak_bytes(network, operation, batch, height, width)
    except (AttributeError, TypeError, ValueError) as error:  # a network of others, of other operations
        logger.debug("the memory that %s takes cannot be estimated (%s)", type(network).__name__, error)
        return None
    if untiled <= available:
        return None
    tiles = [512, 256, SMALLEST_TILE]
    candidates = [Tiling(mode, tile) for mode in ("exact", "blend") for tile in tiles]
    for chosen in candidates:
        needed = peak_bytes(network, operation, batch, height, width, chosen)
        if needed <= available:
            break
    logger.info(
        "%s of %d x %d x %d pixels: %s needed, %s available; using %s tiling with tiles of %d pixels (%s)",
        operation, batch, height, width, size_text(untiled), size_text(available),
        chosen.mode, chosen.tile, size_text(needed),
    )  # fmt: skip
    return chosen


def available_bytes() -> int:
    """Bytes that arrays may still take on the default device.

    Metal and CUDA: what the device recommends or has, less what MLX holds. CPU: memory that is available, or that
    the container (cgroup) still grants; what MLX keeps for reuse counts as available.
    """
    if not is_cpu():
        device = mx.device_info()
        total = device.get("max_recommended_working_set_size") or device.get("total_memory") or device["memory_size"]
        return max(int(total) - mx.get_active_memory(), 0)
    return min(_system_bytes(), _cgroup_bytes()) + mx.get_cache_memory()


def _system_bytes() -> int:
    """What the system could give without swapping; physical memory where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container's limit leaves; caches of files that it would drop count as free."""
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no such files, or "max"
        return 1 << 62
    return max(limit - used + int(statistics.get("inactive_file", 0)), 0)
