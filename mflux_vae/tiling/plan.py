"""Choose the tiling of a call from the available memory and `peak_bytes`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.runtime import memory_limits
from mflux_vae.runtime.device import is_cpu, kind
from mflux_vae.tiling.peak_memory import VECTORS_ERROR
from mflux_vae.tiling.peak_memory import peak_bytes as peak_bytes
from mflux_vae.tiling.tiles import Tiling
from mflux_vae.utils.formatting import size_text

logger = logging.getLogger("mflux_vae")

TilingOption: TypeAlias = bool | Literal["exact", "blend"] | Tiling | None
SMALLEST_TILE = 128
_GPU_TILES = (2048, 1024)
"""Further tiles for exact mode on Metal and CUDA, which wait after every strip and layer."""
_GPU_SHARE = 0.75
"""Share of the available memory that they may need: the estimate knows little of MLX's temporary arrays there."""


def plan(
    network: nn.Module,
    operation: Literal["encode", "decode"],
    batch: int,
    height: int,
    width: int,
    option: TilingOption = None,
) -> Tiling | None:
    """Choose the tiling of a call; None for untiled.

    Args:
        network: the autoencoder.
        operation: "encode" or "decode".
        batch, height, width: number of images and their size in pixels.
        option: None tiles only if memory is short, in exact mode with the largest tile of 512, 256 and 128 pixels that
            fits (on Metal and CUDA also 2048 and 1024, with memory to spare), else blended. False never tiles. True and
            "exact" give the result of the untiled call, "blend" gives blended tiles, both with tiles of 512 pixels. A
            `Tiling` is used as given.

    Raises:
        SettingsError: unknown option, or tiling with a network whose latents are vectors.
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
    raise SettingsError(f"tiling: expected None, False, True, 'exact', 'blend' or a Tiling, got {option!r}")


def _fit_to_memory(
    network: nn.Module, operation: Literal["encode", "decode"], batch: int, height: int, width: int
) -> Tiling | None:
    available = available_bytes()
    try:
        untiled = peak_bytes(network, operation, batch, height, width)
    except (AttributeError, TypeError, ValueError) as error:  # a third-party network with other operations
        logger.debug("cannot estimate the memory of %s: %s", type(network).__name__, error)
        return None
    if untiled <= available:
        return None
    large = [] if is_cpu() else [(Tiling("exact", tile), _GPU_SHARE) for tile in _GPU_TILES]
    tiles = [512, 256, SMALLEST_TILE]
    candidates = [*large, *((Tiling(mode, tile), 1.0) for mode in ("exact", "blend") for tile in tiles)]
    for chosen, share in candidates:
        needed = peak_bytes(network, operation, batch, height, width, chosen)
        if needed <= share * available:
            break
    logger.info(
        "%s of %d x %d x %d pixels: %s needed, %s: %s; using %s tiling with tiles of %d pixels (%s)",
        operation, batch, height, width, size_text(untiled), limit_name(), size_text(available),
        chosen.mode, chosen.tile, size_text(needed),
    )  # fmt: skip
    return chosen


def available_bytes() -> int:
    """Bytes available for arrays on the default device.

    Metal and CUDA: see `runtime.memory_limits`. CPU: available system memory, at most the rest of the container's limit
    (cgroup); MLX's buffer cache counts as available.
    """
    if not is_cpu():
        return memory_limits.free_bytes()
    return min(_system_bytes(), _cgroup_bytes()) + mx.get_cache_memory()


def limit_name() -> str:
    """What `available_bytes` are, for messages: on a Mac other programs use some of them."""
    return "GPU limit" if kind() == "mac" else "available"


def _system_bytes() -> int:
    """Memory available without swapping; physical memory if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory left by the container's limit; reclaimable file caches count as free. 1 << 62 without a limit."""
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return 1 << 62
    return max(limit - used + int(statistics.get("inactive_file", 0)), 0)
