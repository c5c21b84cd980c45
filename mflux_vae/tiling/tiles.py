"""Run a network on images of any size: untiled, in strips with the same result, or in blended tiles.

`Tiling("blend")` runs the network on overlapping tiles and blends them linearly. Norm statistics and attention are
computed per tile, so tones differ slightly from the untiled result.
`Tiling("exact")` runs the network once, layer by layer, in strips of rows. Norm statistics cover the whole image and
convolutions see neighboring strips, so the result equals the untiled one up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae.errors import PluginError, SettingsError
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae.runtime.device import is_cpu
from mflux_vae.tiling.strips import StripRun

Function: TypeAlias = Callable[[mx.array], Sequence[mx.array]]


@dataclass(frozen=True)
class Tiling:
    """How to split a large image.

    Attributes:
        mode: "exact" for the untiled result, or "blend".
        tile: side of a tile in pixels. In exact mode, a strip spans the image's width and has a sixteenth of the
            pixels of a tile.
        overlap: smallest overlap of neighboring tiles as a fraction of the tile's side, 0 to 0.5; blend only.

    Raises:
        SettingsError: unknown mode, tile not positive, overlap out of range.
    """

    mode: Literal["blend", "exact"] = "exact"
    tile: int = 512
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if self.mode not in ("blend", "exact"):
            raise SettingsError(f"mode: expected 'blend' or 'exact', got {self.mode!r}")
        if self.tile < 1:
            raise SettingsError(f"tile: expected a positive number of pixels, got {self.tile}")
        if not 0 <= self.overlap <= 0.5:
            raise SettingsError(f"overlap: expected 0 to 0.5, got {self.overlap}")

    @property
    def strip_pixels(self) -> int:
        """Pixels per strip in exact mode."""
        return max(self.tile**2 // 16, 1)


def encode(network: nn.Module, pixels: mx.array, plan: Tiling | None) -> DiagonalGaussian:
    """Encode with the given tiling. (B, H, W, C) in [-1, 1] -> posterior over (B, H/f, W/f, latent)."""
    return DiagonalGaussian(
        *_run_tiled(array_function(network, "encode"), pixels, plan, 1, network.config.downsampling)
    )


def decode(network: nn.Module, latents: mx.array, plan: Tiling | None) -> mx.array:
    """Decode with the given tiling. (B, h, w, latent) unscaled -> (B, f*h, f*w, C), about [-1, 1], not clipped."""
    return _run_tiled(array_function(network, "decode"), latents, plan, network.config.downsampling, 1)[0]


def array_function(network: nn.Module, operation: str) -> Function:
    """`network.encode` or `network.decode` as a function from one array to a list of them."""

    def encode(pixels: mx.array) -> list[mx.array]:
        posterior = network.encode(pixels)
        if not (hasattr(posterior, "mean") and hasattr(posterior, "logvar")):
            found = "an array" if hasattr(posterior, "dtype") else f"a {type(posterior).__name__}"
            raise PluginError(f"{type(network).__name__}.encode() returned {found}; expected a DiagonalGaussian")
        return [posterior.mean, posterior.logvar]

    def decode(latents: mx.array) -> list[mx.array]:
        return [network.decode(latents)]

    return {"encode": encode, "decode": decode}[operation]


def _run_tiled(function: Function, x: mx.array, plan: Tiling | None, up: int, down: int) -> Sequence[mx.array]:
    if plan is None:
        return function(x)
    if plan.mode == "blend":
        return _run_blended(function, x, plan, up, down)
    images = [StripRun(plan.strip_pixels).run(function, image) for image in mx.split(x, x.shape[0])]
    return images[0] if len(images) == 1 else [mx.concatenate(list(results)) for results in zip(*images, strict=True)]


def _run_blended(function: Function, x: mx.array, plan: Tiling, up: int, down: int) -> list[mx.array]:
    """Run a function on overlapping tiles of x and blend the results, which are up / down times as large as x.

    Args:
        function: maps (B, h, w, C) to any number of arrays (B, h * up / down, w * up / down, D).
    """
    cell = max(up, down)  # pixels per latent: tiles start and end between latents
    tile = max(plan.tile // cell, 1)
    rows, columns = (tile_spans(x.shape[axis] // down, tile, plan.overlap) for axis in (1, 2))
    results: list[mx.array] = []
    dtypes: list[mx.Dtype] = []
    for (top, bottom), row_weight in zip(rows, blend_weights(rows, up), strict=True):
        for (left, right), column_weight in zip(columns, blend_weights(columns, up), strict=True):
            pieces = function(x[:, top * down : bottom * down, left * down : right * down])
            weight = mx.array(row_weight[:, None, None] * column_weight[:, None], mx.float32)
            if not results:
                shape = x.shape[0], x.shape[1] * up // down, x.shape[2] * up // down
                dtypes = [piece.dtype for piece in pieces]
                # on a GPU, where networks may compute in half precision, sums of several tiles are float32
                sums = dtypes if is_cpu() else [mx.float32] * len(pieces)
                results = [mx.zeros((*shape, p.shape[-1]), dtype) for p, dtype in zip(pieces, sums, strict=True)]
            for result, piece in zip(results, pieces, strict=True):
                result[:, top * up : bottom * up, left * up : right * up] += (piece * weight).astype(result.dtype)
            mx.eval(results)
    return [result.astype(dtype) for result, dtype in zip(results, dtypes, strict=True)]


def tile_spans(length: int, tile: int, overlap: float) -> list[tuple[int, int]]:
    """Start and end of each tile along an axis: equal sizes, evenly spaced, overlapping by at least `overlap`."""
    if length <= tile:
        return [(0, length)]
    shared = min(int(np.ceil(tile * overlap)), tile - 1)
    steps = -(-(length - tile) // (tile - shared))
    starts = [round(i * (length - tile) / steps) for i in range(steps + 1)]
    return [(start, start + tile) for start in starts]


def blend_weights(spans: Sequence[tuple[int, int]], scale: int) -> list[np.ndarray]:
    """Blending weights of each tile along an axis, `scale` per cell: linear in overlaps, summing to one."""
    total = np.zeros(spans[-1][1] * scale)
    weights = []
    for i, (start, end) in enumerate(spans):
        position = np.arange((end - start) * scale) + 0.5
        weight = np.ones_like(position)
        if i and (shared := (spans[i - 1][1] - start) * scale):
            weight = np.minimum(weight, position / shared)
        if i + 1 < len(spans) and (shared := (end - spans[i + 1][0]) * scale):
            weight = np.minimum(weight, position[::-1] / shared)
        weights.append(weight)
        total[start * scale : end * scale] += weight
    return [weight / total[start * scale : end * scale] for weight, (start, end) in zip(weights, spans, strict=True)]
