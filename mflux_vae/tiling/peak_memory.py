"""How much memory a call takes.

The estimate walks the network as `mflux_vae.tiling.strips` does when it computes, without computing: what is held at
each step is known to the byte, and what each step takes besides is a formula per operation, below.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.kernels.attention import CHUNK_SCORES
from mflux_vae.kernels.cpu.parallel import streams
from mflux_vae.kernels.overrides import is_pointwise
from mflux_vae.networks.layers import Attention, LinearAttention
from mflux_vae.runtime.device import is_cpu
from mflux_vae.tiling.strips import Buffered, Convolution, LazyArray, Repeated, Source, StripRun, Whole
from mflux_vae.tiling.tiles import Tiling, function_of, spans

WHOLE = "an autoencoder whose latents are vectors sees the whole image: tiling=None"


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

    Raises:
        SettingsError: tiles of a network whose latents are vectors.

    Returns:
        bytes, as the growth of `mx.get_peak_memory()` over `mx.get_active_memory()` before the call.
    """
    factor = network.config.downsampling
    height, width = max(height // factor, 1), max(width // factor, 1)
    function = function_of(network, what)
    cell, channels = (factor, network.config.in_channels) if what == "encode" else (1, network.config.latent_channels)
    if network.config.vectors:
        if tiling is not None:
            raise SettingsError(WHOLE)
        return _in_one_piece(function, (batch, *(cell, cell) * (what == "encode"), channels))[0]
    if tiling is None:
        return _in_one_piece(function, (batch, height * cell, width * cell, channels))[0]
    if tiling.mode == "exact":
        walk = _Walk(tiling.strip_pixels)
        results = _bytes(walk.run(function, mx.zeros((1, height * cell, width * cell, channels))))
        # images come one after the other, and are joined at last
        return max(walk.peak + (batch - 1) * results, 2 * batch * results if batch > 1 else 0)
    tile = max(tiling.tile // factor, 1)
    (top, bottom), (left, right) = (spans(length, tile, tiling.overlap)[0] for length in (height, width))
    peak, results = _in_one_piece(function, (batch, (bottom - top) * cell, (right - left) * cell, channels))
    canvas = results * height * width // ((bottom - top) * (right - left))
    return canvas + max(peak, 3 * results + canvas)  # a tile joins the others in a copy of them


def _in_one_piece(function: Callable[[Any], Sequence[Any]], shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes at the peak of one call, and of its results."""
    tally = _Tally()
    with kernels.deferred():
        results = function(_Weighed(tally, shape, mx.float32, 0))
        for result in results:
            result.settle()
    return tally.peak, sum(result.size for result in results)


class _Tally(StripRun):
    """What arrays take together.

    Attributes:
        peak: the most bytes at any time.
        freed: bytes that go back when the evaluation ends that is going on.
    """

    def __init__(self, pixels: int | None = None):
        super().__init__(pixels)
        self.peak = self.freed = 0

    def take(self, transient: int) -> None:
        """Bytes besides those held are needed for a moment."""
        self.peak = max(self.peak, self.held + self.freed + transient)


class _Weighed(LazyArray):
    """Stands in for an array and counts while Python keeps it: what network code holds on to is what it costs.

    Args:
        inputs: what it is made of pixel by pixel. Then it takes nothing before it is `settle`d, as MLX computes such a
            step when its result is asked for, and in the memory of an input that nothing else holds any more.
        apart: but not in an input's, which is needed to the end.
    """

    size = 0  # also of one whose making is interrupted

    def __init__(
        self,
        tally: _Tally,
        shape: Sequence[int],
        dtype: mx.Dtype,
        size: int,
        inputs: Sequence[_Weighed] = (),
        *,
        apart: bool = False,
    ):
        super().__init__(tally, shape, dtype)
        self._pending, self._apart = list(inputs), apart
        if not inputs:
            self._take(size)

    def __del__(self) -> None:
        if self.size:
            self.job.held -= self.size

    def settle(self) -> None:
        """Computed now, if it was not, in one evaluation with all that it waits for; at its end arrays are freed."""
        tally: Any = self.job
        self._compute()
        tally.freed = 0

    def _compute(self) -> None:
        if not self._pending:
            return
        tally: Any = self.job
        for stand in self._pending:
            stand._compute()
        before, watched = tally.held, [(weakref.ref(stand), stand.size) for stand in self._pending]
        del stand
        self._pending.clear()
        size = prod(self.shape) * self.dtype.size
        tally.freed += before - tally.held
        if not self._apart and any(left() is None and free >= size for left, free in watched):
            tally.freed -= size
        self._take(size)
        tally.take(0)

    def _take(self, size: int) -> None:
        self.size = size
        self.job.held += size

    def __mlx_function__(
        self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]
    ) -> LazyArray:
        tally: Any = self.job
        if function in kernels.FUSED and not (is_cpu() and self.dtype == mx.float32):
            return function.__wrapped__(*arguments, **named)  # type: ignore[attr-defined]
        example = function(*map(_example, arguments), **{name: _example(value) for name, value in named.items()})
        stands = [value for value in (*arguments, *named.values()) if isinstance(value, _Weighed)]
        apart = function in _APART
        if is_pointwise(function) or apart:
            return _Weighed(tally, example.shape, example.dtype, 0, stands, apart=apart)
        for stand in stands:
            stand.settle()
        if function is kernels.group_norm:  # its statistics were taken, the rest is pixel by pixel
            return _Weighed(tally, example.shape, example.dtype, 0, stands)
        transient = example.nbytes
        if function in _WEIGHTS:
            batch, height, width, channels = self.shape
            times = 2 if function is kernels.repeat_conv2d else 1
            shape = batch, times * height, times * width, channels
            weight = arguments[_WEIGHTS[function]]
            transient += _convolution(shape, weight, named.get("stride", 1), _INTERMEDIATES.get(function, 0))
        elif function is kernels.conv_transpose2d and is_cpu():
            phases = (*self.shape[:3], 4 * example.shape[3])  # which wait to be put in their order
            tally.take(_phases(self.shape, arguments[1]) + 4 * prod(phases))
            phased = _Weighed(tally, phases, example.dtype, 4 * prod(phases))
            return _Weighed(tally, example.shape, example.dtype, 0, [phased], apart=True)
        elif function in _ATTENTION:
            transient += _ATTENTION[function](example.shape)
        else:  # in another order
            transient += prod(self.shape) * self.dtype.size
        tally.take(transient)
        return _Weighed(tally, example.shape, example.dtype, example.nbytes)


class _Walk(_Tally):
    """A run in strips that computes nothing and keeps count."""

    def compute(self, held: Buffered, start: int, stop: int) -> mx.array:
        strip = mx.zeros((held.shape[0], stop - start, *held.shape[2:]), held.dtype)  # never computed
        if isinstance(held, Convolution):
            (x,), (first, end) = held.inputs, held.window(start, stop)
            first, end = max(first, 0), min(end, x.shape[1])
            x.reach(first, end)
            read = _read(x, first, end)
            batch, _, *across = x.shape
            rows = prod((batch, end - first, *across)) * x.dtype.size if read else 0
            own = _convolution((batch, (stop - start) * held.stride, *across), held.weight, held.stride)
            self.take(max(read, rows + own + strip.nbytes))
        elif isinstance(held, Whole):
            for x in held.inputs:
                x.reach(0, x.shape[1])
            own = _ATTENTION.get(held.function, _attention)(held.shape)
            self.take(sum(_read(x, 0, x.shape[1]) for x in held.inputs) + own + strip.nbytes)
        else:
            for x in held.inputs:
                x.reach(start, stop)
            self.take(sum(_read(x, start, stop) for x in held.inputs) + strip.nbytes)
        return strip

    def statistics(self, strip: mx.array, groups: int) -> tuple[mx.array, mx.array]:
        few = mx.zeros((strip.shape[0], strip.shape[3]))
        return few, few


def _example(value: Any) -> Any:
    return mx.zeros(value.shape, value.dtype) if isinstance(value, LazyArray) else value


def _bytes(arrays: Sequence[mx.array]) -> int:
    return sum(array.nbytes for array in arrays)


def _read(x: LazyArray, start: int, stop: int) -> int:
    """Bytes taken while rows are read; 0 where they need no copy. Each step of what is passed through has its own."""
    if isinstance(x, Source) or (isinstance(x, Buffered) and len(x.strips(start, stop)) == 1):
        return 0
    through = 0
    if not isinstance(x, Buffered):
        rows = (start // 2, (stop + 1) // 2) if isinstance(x, Repeated) else (start, stop)
        through = sum(_read(stand, *rows) for stand in x.inputs)
    return through + prod((x.shape[0], stop - start, *x.shape[2:])) * x.dtype.size


_WEIGHTS: dict[Callable[..., Any], int] = {
    kernels.conv2d: 1,
    kernels.repeat_conv2d: 1,
    kernels.norm_silu_conv2d: 2,
}
"""Which argument of a convolution is the weight."""

_INTERMEDIATES: dict[Callable[..., Any], int] = {kernels.repeat_conv2d: 1, kernels.norm_silu_conv2d: 2}
"""Arrays that are made of a band's rows before they are convolved."""

_APART = (kernels.upsample_nearest_2x, kernels.leaky_relu)
"""What cannot be computed in its argument's memory."""


def _convolution(shape: Sequence[int], weight: mx.array, stride: int, intermediates: int = 0) -> int:
    """Bytes of a convolution's own; on Metal and CUDA a copy of the padded image."""
    return (
        kernels.workspace_bytes(shape, weight.shape, stride, intermediates=intermediates)
        if is_cpu()
        else 4 * prod(shape)
    )


def _phases(shape: Sequence[int], weight: mx.array) -> int:
    """Bytes of a transposed convolution's own, which is one to four phases: its weights in their order, made of as many
    numbers, and the convolution's."""
    out, _, _, channels = weight.shape
    weights = 4 * 16 * out * channels
    return weights + max(weights, kernels.workspace_bytes(shape, (4 * out, 2, 2, channels)))


def _attention(shape: Sequence[int]) -> int:
    """Bytes of attention's own: norm, queries, keys, values, the sum and its projection; and scores, as many as are
    there at once, on their way to weights. On a CPU the norm's are gone by then, and every stream has scores."""
    batch, height, width, _ = shape
    scores = batch * (height * width) ** 2
    if not is_cpu():
        return 4 * (6 * prod(shape) + 3 * min(scores, kernels.MAX_SCORES))
    return 4 * (5 * prod(shape) + max(2 * min(scores, streams() * CHUNK_SCORES), 3 * min(scores, CHUNK_SCORES)))


def _linear_attention(shape: Sequence[int]) -> int:
    """Bytes of linear attention's own: queries, keys and values, each of them in its own order too, the keys' weights
    and the sum; and what keys and values make, channels by channels."""
    return 4 * (8 * prod(shape) + 2 * shape[0] * shape[-1] ** 2)


_ATTENTION: dict[Callable[..., Any], Callable[[Sequence[int]], int]] = {
    Attention.__call__: _attention,
    LinearAttention.__call__: _linear_attention,
}
"""Bytes of attention's own, by shape."""
