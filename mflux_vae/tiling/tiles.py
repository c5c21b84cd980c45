"""Running a network on images of any size: in one piece, in strips that give the same result, or in blended tiles.

`Tiling("blend")` runs the network on overlapping tiles and fades each into the next. Every tile has its own norm
statistics and attention, so tones differ from the untiled result a little.
`Tiling("exact")` runs the network once, layer by layer, in strips of rows: norms take their statistics over the whole
image and convolutions see their neighbours, so that the result is the untiled one but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae.errors import SettingsError
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae.tiling.strips import StripRun

Function: TypeAlias = Callable[[mx.array], Sequence[mx.array]]


@dataclass(frozen=True)
class Tiling:
    """How a large image is cut.

    Attributes:
        mode: "exact" for the untiled result, or "blend".
        tile: side of a tile in pixels. In exact mode a strip spans the image's width and has a sixteenth of a tile's
            pixels.
        overlap: share of a tile's side that it has in common with its neighbour at least, 0 to 0.5; blend only.

    Raises:
        SettingsError: another mode, a tile that is not positive, an overlap out of range.
    """

    mode: Literal["blend", "exact"] = "exact"
    tile: int = 512
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if self.mode not in ("blend", "exact"):
            raise SettingsError(f"tiling is 'blend' or 'exact', not {self.mode!r}")
        if self.tile < 1:
            raise SettingsError(f"a tile's side is a positive number of pixels, not {self.tile}")
        if not 0 <= self.overlap <= 0.5:
            raise SettingsError(f"tiles overlap by 0 to 0.5 of their side, not {self.overlap}")

    @property
    def strip_pixels(self) -> int:
        """Pixels of a strip in exact mode."""
        return max(self.tile**2 // 16, 1)


def encode(network: nn.Module, pixels: mx.array, plan: Tiling | None) -> DiagonalGaussian:
    """`network.encode`, as planned. (B, H, W, C) in [-1, 1] -> posterior over (B, H/f, W/f, latent)."""
    return DiagonalGaussian(
        *_run_tiled(array_function(network, "encode"), pixels, plan, 1, network.config.downsampling)
    )


def decode(network: nn.Module, latents: mx.array, plan: Tiling | None) -> mx.array:
    """`network.decode`, as planned. (B, h, w, latent) unscaled -> (B, f*h, f*w, C), about [-1, 1], not clipped."""
    return _run_tiled(array_function(network, "decode"), latents, plan, network.config.downsampling, 1)[0]


def array_function(network: nn.Module, operation: str) -> Function:
    """`network.encode` or `network.decode` as a function from one array to a list of them."""

    def encode(pixels: mx.array) -> list[mx.array]:
        posterior = network.encode(pixels)
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
    """Run a function on overlapping tiles of x and join its results, whose sides are those of x times up / down.

    Args:
        function: (B, h, w, C) to any number of arrays (B, h * up / down, w * up / down, D).
    """
    cell = max(up, down)  # pixels per latent: tiles start and end between latents
    tile = max(plan.tile // cell, 1)
    rows, columns = (tile_spans(x.shape[axis] // down, tile, plan.overlap) for axis in (1, 2))
    results: list[mx.array] = []
    for (top, bottom), row_weight in zip(rows, blend_weights(rows, up), strict=True):
        for (left, right), column_weight in zip(columns, blend_weights(columns, up), strict=True):
            pieces = function(x[:, top * down : bottom * down, left * down : right * down])
            weight = mx.array(row_weight[:, None, None] * column_weight[:, None], mx.float32)
            if not results:
                shape = x.shape[0], x.shape[1] * up // down, x.shape[2] * up // down
                results = [mx.zeros((*shape, piece.shape[-1]), piece.dtype) for piece in pieces]
            for result, piece in zip(results, pieces, strict=True):
                result[:, top * up : bottom * up, left * up : right * up] += (piece * weight).astype(piece.dtype)
            mx.eval(results)
    return results


def tile_spans(length: int, tile: int, overlap: float) -> list[tuple[int, int]]:
    """Start and end of each tile along an axis: all of one size, evenly spread, neighbours share `overlap` or more."""
    if length <= tile:
        return [(0, length)]
    shared = min(int(np.ceil(tile * overlap)), tile - 1)
    steps = -(-(length - tile) // (tile - shared))
    starts = [round(i * (length - tile) / steps) for i in range(steps + 1)]
    return [(start, start + tile) for start in starts]


def blend_weights(spans: Sequence[tuple[int, int]], scale: int) -> list[np.ndarray]:
    """Each tile's weights along an axis, `scale` per cell: linear where two tiles overlap; all tiles' sum to one."""
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
