"""How much memory a call takes, how much there is, and how a call is therefore tiled.

The estimate walks the network as `mflux_vae.strips` does when it computes, without computing: what is held at each
step is known to the byte, and what each step takes besides is a formula per operation, below.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.runtime import is_cpu
from mflux_vae.strips import Convolution, Held, Job, Repeated, Source, Stand, Whole
from mflux_vae.tiling import Tiling, function_of, spans

logger = logging.getLogger("mflux_vae")

Asked: TypeAlias = bool | Literal["exact", "blend"] | Tiling | None
SMALLEST_TILE = 128


def plan(
    network: nn.Module, what: Literal["encode", "decode"], batch: int, height: int, width: int, asked: Asked = None
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
        SettingsError: asked for something else.
    """
    if isinstance(asked, Tiling):
        return asked
    if asked is None:
        return _fitting(network, what, batch, height, width)
    if asked is False:
        return None
    if asked is True or asked == "exact":
        return Tiling("exact")
    if asked == "blend":
        return Tiling("blend")
    raise SettingsError(f"tiling is None, False, True, 'exact', 'blend' or a Tiling, not {asked!r}")


def _fitting(
    network: nn.Module, what: Literal["encode", "decode"], batch: int, height: int, width: int
) -> Tiling | None:
    available = limit()
    try:
        whole = peak_bytes(network, what, batch, height, width)
    except (AttributeError, TypeError, ValueError) as error:  # a network of others, of other operations
        logger.debug("the memory that %s takes cannot be estimated (%s)", type(network).__name__, error)
        return None
    if whole <= available:
        return None
    tiles = [512, 256, SMALLEST_TILE]
    choices = [Tiling(mode, tile) for mode in ("exact", "blend") for tile in tiles]
    for chosen in choices:
        needed = peak_bytes(network, what, batch, height, width, chosen)
        if needed <= available:
            break
    logger.info(
        "%s of %d x %d x %d pixels would take %.1f GB of memory, %.1f GB are left: tiled (%s, %d pixels), %.1f GB",
        what, batch, height, width, whole / 1e9, available / 1e9, chosen.mode, chosen.tile, needed / 1e9,
    )  # fmt: skip
    return chosen


def limit() -> int:
    """Bytes that arrays may still take on the default device.

    Metal and CUDA: what the device recommends or has, less what MLX holds. CPU: memory that is available, or that
    the container (cgroup) still grants; what MLX keeps for reuse counts as available.
    """
    if not is_cpu():
        device = mx.device_info()
        total = device.get("max_recommended_working_set_size") or device.get("total_memory") or device["memory_size"]
        return max(int(total) - mx.get_active_memory(), 0)
    return min(_available(), _granted()) + mx.get_cache_memory()


def _available() -> int:
    """What the system could give without swapping; physical memory where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _granted(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container's limit leaves; caches of files that it would drop count as free."""
    try:
        most = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no such files, or "max"
        return 1 << 62
    return max(most - used + int(statistics.get("inactive_file", 0)), 0)


def peak_bytes(
    network: nn.Module,
    what: Literal["encode", "decode"],
    batch: int,
    height: int,
    width: int,
    tiling: Tiling | None = None,
) -> int:
    """Estimate the most memory that arrays take at once during a call, besides weights and the input.

    Args:
        network: what encodes or decodes.
        what: which of both.
        batch, height, width: images, and their size in pixels.
        tiling: how the call is tiled.

    Returns:
        bytes, as the growth of `mx.get_peak_memory()` over `mx.get_active_memory()` before the call.
    """
    factor = network.config.downsampling
    height, width = max(height // factor, 1), max(width // factor, 1)
    function = function_of(network, what)
    cell, channels = (factor, network.config.in_channels) if what == "encode" else (1, network.config.latent_channels)
    if tiling is None or tiling.mode == "exact":
        images, pixels = (batch, None) if tiling is None else (1, tiling.strip_pixels)
        peak, results = _walked(function, (images, height * cell, width * cell, channels), pixels)
        # images of a batch come one after the other, and are joined at last
        return peak if images == batch else max(peak + (batch - 1) * results, 2 * batch * results)
    tile = max(tiling.tile // factor, 1)
    (top, bottom), (left, right) = (spans(length, tile, tiling.overlap)[0] for length in (height, width))
    peak, results = _walked(function, (batch, (bottom - top) * cell, (right - left) * cell, channels), None)
    canvas = results * height * width // ((bottom - top) * (right - left))
    return canvas + max(peak, 3 * results + canvas)


def _walked(function: Callable[[Any], Sequence[Any]], shape: tuple[int, ...], pixels: int | None) -> tuple[int, int]:
    """Bytes at the peak of one call, and of its results."""
    walk = _Walk(pixels)
    results = walk.run(function, mx.zeros(shape))
    return walk.peak, sum(result.nbytes for result in results)


class _Walk(Job):
    """A job that computes nothing and keeps count.

    Attributes:
        peak: the most bytes at any step.
    """

    def __init__(self, pixels: int | None):
        super().__init__(pixels)
        self.peak = 0

    def compute(self, held: Held, start: int, stop: int) -> mx.array:
        strip = mx.zeros((held.shape[0], stop - start, *held.shape[2:]), held.dtype)  # never computed
        if isinstance(held, Convolution):
            (x,), (first, end) = held.inputs, held.window(start, stop)
            first, end = max(first, 0), min(end, x.shape[1])
            x.reach(first, end)
            self._take(_read(x, first, end))
            rows = 0 if _is_view(x, first, end) else _bytes(x, first, end)
            self._take(rows + _convolution(held, (x.shape[0], end - first, *x.shape[2:]), strip))
        elif isinstance(held, Whole):
            for x in held.inputs:
                x.reach(0, x.shape[1])
            self._take(sum(_read(x, 0, x.shape[1]) for x in held.inputs) + _whole(held, strip))
        else:
            for x in held.inputs:
                x.reach(start, stop)
            self._take(sum(_read(x, start, stop) for x in held.inputs) + strip.nbytes)
        return strip

    def statistics(self, strip: mx.array, groups: int) -> tuple[mx.array, mx.array]:
        self._take(2 * strip.size * 4)  # centred, squared: float32
        few = mx.zeros((strip.shape[0], strip.shape[3]))
        return few, few

    def _take(self, transient: int) -> None:
        self.peak = max(self.peak, self.held + transient)


def _bytes(x: Stand, start: int, stop: int) -> int:
    return prod((x.shape[0], stop - start, *x.shape[2:])) * x.dtype.size


def _is_view(x: Stand, start: int, stop: int) -> bool:
    """Whether rows are read without a copy."""
    return isinstance(x, Source) or (isinstance(x, Held) and len(x.strips(start, stop)) == 1)


def _read(x: Stand, start: int, stop: int) -> int:
    """Bytes taken while rows are read: each step of what is passed through has its own."""
    if _is_view(x, start, stop):
        return 0
    inputs = (start // 2, (stop + 1) // 2) if isinstance(x, Repeated) else (start, stop)
    through = sum(_read(stand, *inputs) for stand in x.inputs) if not isinstance(x, Held) else 0
    return through + _bytes(x, start, stop)


# What a step takes besides its input. On a CPU MLX dispatches about a hundred operations ahead and frees memory as
# they end, so that all arrays that one convolution makes on its way are there at once.


def _convolution(held: Convolution, shape: tuple[int, ...], strip: mx.array) -> int:
    """Bytes of a convolution's own arrays, its result included."""
    batch, _, width, channels = shape
    _, kh, kw, _ = held.weight.shape
    x = prod(shape) * strip.dtype.size
    if not is_cpu():
        return x + strip.nbytes
    if kh == kw == 1:
        return 2 * strip.nbytes
    if channels > 256 or width < 12 or held.stride == 2:
        return x + kh * kw * strip.shape[1] * strip.shape[2] * batch * channels * strip.dtype.size + 2 * strip.nbytes
    return x + (kh * kw + 1) * strip.nbytes


def _whole(held: Whole, strip: mx.array) -> int:
    """Bytes that attention takes: norm, queries, keys, values, scores of all pixels with all, twice, and the sum."""
    pixels = strip.shape[1] * strip.shape[2]
    return 8 * strip.nbytes + 2 * strip.shape[0] * pixels**2 * 4
