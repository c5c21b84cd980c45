"""Estimate the peak memory of a call.

The estimate runs the network on shapes only, in the order of MLX or `mflux_vae.tiling.strips`. The bytes held at each
step are exact; the workspace of each step is a formula per operation, below. On a CPU, MLX allocates ahead of what it
computes and frees late, so a small image needs more than its largest step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.kernels.cpu.extension import FREE_RUNNING
from mflux_vae.kernels.overrides import is_pointwise
from mflux_vae.networks.layers import Attention, LinearAttention
from mflux_vae.networks.video import wan
from mflux_vae.runtime.device import is_cpu
from mflux_vae.tiling.strips import Buffered, Convolution, LazyArray, Source, StripRun, Upsampled, WholeArray
from mflux_vae.tiling.tiles import Tiling, array_function, tile_spans

VECTORS_ERROR = "tiling: not supported by autoencoders with vector latents; pass tiling=None"


def peak_bytes(
    network: nn.Module,
    operation: Literal["encode", "decode"],
    batch: int,
    height: int,
    width: int,
    tiling: Tiling | None = None,
) -> int:
    """Estimate the peak memory (bytes) of a call, besides weights and the input.

    Args:
        network: the autoencoder.
        operation: "encode" or "decode".
        batch, height, width: number of images and their size in pixels.
        tiling: tiling of the call; None for untiled.

    Raises:
        SettingsError: tiling with a network whose latents are vectors.

    Returns:
        bytes: `mx.get_peak_memory()` after the call minus `mx.get_active_memory()` before it.
    """
    factor = network.config.downsampling
    height, width = max(height // factor, 1), max(width // factor, 1)
    function = array_function(network, operation)
    parameters: dict[str, mx.array] = dict(tree_flatten(network.parameters()))
    weights = _bytes(list(parameters.values()))
    cell, channels = (
        (factor, network.config.in_channels) if operation == "encode" else (1, network.config.latent_channels)
    )
    if network.config.vectors:
        if tiling is not None:
            raise SettingsError(VECTORS_ERROR)
        return _untiled_peak(function, (batch, *(cell, cell) * (operation == "encode"), channels), weights)[0]
    if tiling is None:
        return _untiled_peak(function, (batch, height * cell, width * cell, channels), weights)[0]
    if tiling.mode == "exact":
        dry_run = _DryRun(tiling.strip_pixels)
        results = _bytes(dry_run.run(function, mx.zeros((1, height * cell, width * cell, channels))))
        # images are processed one by one and concatenated at the end
        return max(dry_run.peak + (batch - 1) * results, 2 * batch * results if batch > 1 else 0)
    tile = max(tiling.tile // factor, 1)
    (top, bottom), (left, right) = (tile_spans(length, tile, tiling.overlap)[0] for length in (height, width))
    peak, results = _untiled_peak(function, (batch, (bottom - top) * cell, (right - left) * cell, channels), weights)
    canvas = results * height * width // ((bottom - top) * (right - left))
    return canvas + max(peak, 3 * results + canvas)  # adding a tile copies the canvas


def _untiled_peak(
    function: Callable[[Any], Sequence[Any]], shape: tuple[int, ...], weights: int = 0
) -> tuple[int, int]:
    """Peak bytes of one call besides the weights, and bytes of its results."""
    counter = _MemoryCounter(weights=weights)
    results = function(_CountedArray(counter, shape, mx.float32, 0))
    for result in results:
        result.evaluate()
    return counter.peak, sum(result.size for result in results)


class _MemoryCounter(StripRun):
    """Count the bytes of all arrays.

    Attributes:
        peak: most bytes held at any time.
        weights: bytes held besides.
    """

    def __init__(self, pixels: int | None = None, weights: int = 0):
        super().__init__(pixels)
        self.peak = 0
        self.weights = weights
        self._freed: list[tuple[int, int]] = []

    @property
    def freed(self) -> int:
        """Bytes in memory that nothing needs after an operation that may still have to run."""
        return sum(size for size, _ in self._freed)

    def free(self, size: int, tasks: int) -> None:
        """Count bytes as freed by an operation of so many tasks: released after `wait`, or on a CPU `_AHEAD` tasks."""
        self._freed.append((size, tasks))
        while is_cpu() and sum(tasks for _, tasks in self._freed) > _AHEAD:
            del self._freed[0]

    def wait(self) -> None:
        """Release what is freed."""
        self._freed.clear()

    def record(self, transient: int) -> None:
        """Update the peak for `transient` bytes on top of those held."""
        self.peak = max(self.peak, self.held_bytes + self.freed + transient)


class _CountedArray(LazyArray):
    """A stand-in for an array that counts its bytes for as long as Python references it.

    Args:
        inputs: arrays that it is computed from. It then takes no memory before `evaluate`, as MLX is lazy.
        workspace, tasks: bytes and tasks of MLX that computing it takes.
        in_place: reuse the memory of an input that has no other reference.
    """

    size = 0  # for `__del__` if `__init__` fails

    def __init__(
        self,
        counter: _MemoryCounter,
        shape: Sequence[int],
        dtype: mx.Dtype,
        size: int,
        inputs: Sequence[_CountedArray] = (),
        *,
        workspace: int = 0,
        tasks: int = 1,
        in_place: bool = False,
    ):
        super().__init__(counter, shape, dtype)
        self._waiting_for, self._in_place = list(inputs), in_place
        self._workspace, self._tasks = workspace, tasks
        if not inputs:
            self._allocate(size)

    def __del__(self) -> None:
        if self.size:
            self.strip_run.held_bytes -= self.size

    def evaluate(self) -> None:
        """Evaluate this array and the inputs it waits for together; then release freed arrays."""
        counter: Any = self.strip_run
        self._allocate_pending()
        counter.wait()

    def _allocate_pending(self) -> None:
        if not self._waiting_for:
            return
        counter: Any = self.strip_run
        for array in self._waiting_for:
            array._allocate_pending()
        size = prod(self.shape) * self.dtype.size
        crowded = counter.weights + counter.held_bytes + counter.freed > FREE_RUNNING
        if is_cpu() and ((not self._in_place and size >= _AWAITED) if kernels.native_expected() else crowded):
            counter.wait()
        before, watched = counter.held_bytes, [(weakref.ref(array), array.size) for array in self._waiting_for]
        del array
        self._waiting_for.clear()
        freed = before - counter.held_bytes
        if self._in_place and any(left() is None and free >= size for left, free in watched):
            freed -= size
        counter.free(freed, self._tasks)
        self._allocate(size)
        counter.record(self._workspace)
        if not kernels.native_expected():  # MLX allocates the workspace ahead, too
            counter.free(self._workspace, 0)

    def _allocate(self, size: int) -> None:
        self.size = size
        self.strip_run.held_bytes += size

    def __mlx_function__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> LazyArray:
        whole = kernels.native_expected() and self.dtype == mx.float32 and function is not kernels.partial_conv2d
        if function in kernels.FUSED and not whole:
            return function.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]
        example = function(*map(_example, args), **{name: _example(value) for name, value in kwargs.items()})
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, _CountedArray)]
        counter: Any = self.strip_run
        lazy = partial(_CountedArray, counter, example.shape, example.dtype, 0)
        if function in (_NATIVE if kernels.native_expected() else _NOT_IN_PLACE):
            return lazy(inputs)
        if is_pointwise(function):
            return lazy(inputs, in_place=True)
        if function is kernels.group_norm:  # distances from the mean in float32, then pixel by pixel
            distances = 4 * prod(self.shape)
            if is_cpu():
                return lazy(inputs, in_place=True, workspace=distances, tasks=15)
            self.evaluate()
            counter.record(distances)
            return lazy(inputs, in_place=True)
        workspace = 0
        if function in _WEIGHT_ARGUMENT:
            batch, height, width, channels = self.shape
            times = 2 if function is kernels.repeat_conv2d else 1
            shape = batch, times * height, times * width, channels
            weight = args[_WEIGHT_ARGUMENT[function]].shape
            workspace = _convolution_workspace(shape, weight, kwargs.get("stride", 1))
        elif function is kernels.conv_transpose2d and not kernels.native_expected():
            phases = mx.zeros((*self.shape[:3], 4 * example.shape[3]), example.dtype)  # reordered later
            return lazy([self._computed(phases, inputs, _transposed_workspace(self.shape, args[1]))])
        elif function in _ATTENTION_WORKSPACE:
            workspace = _ATTENTION_WORKSPACE[function](example.shape)
        elif function is not kernels.conv_transpose2d:  # a reordering copy
            workspace = prod(self.shape) * self.dtype.size
        return self._computed(example, inputs, workspace)

    def _computed(self, example: mx.array, inputs: Sequence[_CountedArray], workspace: int) -> _CountedArray:
        """An array that is computed with a workspace: on a GPU now, on a CPU when it is evaluated."""
        counter: Any = self.strip_run
        if is_cpu():
            tasks = 2 if kernels.native_expected() else 4
            return _CountedArray(counter, example.shape, example.dtype, 0, inputs, workspace=workspace, tasks=tasks)
        for array in inputs:
            array.evaluate()
        counter.record(example.nbytes + workspace)
        return _CountedArray(counter, example.shape, example.dtype, example.nbytes)


class _DryRun(_MemoryCounter):
    """Run in strips that counts memory without computing."""

    def compute(self, buffer: Buffered, start: int, stop: int) -> mx.array:
        strip = mx.zeros((buffer.shape[0], stop - start, *buffer.shape[2:]), buffer.dtype)  # never evaluated
        if isinstance(buffer, Convolution):
            (x,), (first, end) = buffer.inputs, buffer.window(start, stop)
            first, end = max(first, 0), min(end, x.shape[1])
            x.prepare(first, end)
            copied = _read_bytes(x, first, end)
            batch, _, *rest = x.shape
            rows = prod((batch, end - first, *rest)) * x.dtype.size if copied else 0
            workspace = _convolution_workspace(
                (batch, (stop - start) * buffer.stride, *rest), buffer.weight.shape, buffer.stride
            )
            self.record(max(copied, rows + workspace + strip.nbytes))
        elif isinstance(buffer, WholeArray):
            for x in buffer.inputs:
                x.prepare(0, x.shape[1])
            workspace = _ATTENTION_WORKSPACE.get(buffer.function, _attention_workspace)(buffer.shape)
            self.record(sum(_read_bytes(x, 0, x.shape[1]) for x in buffer.inputs) + workspace + strip.nbytes)
        else:
            for x in buffer.inputs:
                x.prepare(start, stop)
            self.record(sum(_read_bytes(x, start, stop) for x in buffer.inputs) + strip.nbytes)
        return strip

    def statistics(self, strip: mx.array, groups: int) -> tuple[mx.array, mx.array]:
        statistics = mx.zeros((strip.shape[0], strip.shape[3]))
        return statistics, statistics


def _example(value: Any) -> Any:
    return mx.zeros(value.shape, value.dtype) if isinstance(value, LazyArray) else value


def _bytes(arrays: Sequence[mx.array]) -> int:
    return sum(array.nbytes for array in arrays)


def _read_bytes(x: LazyArray, start: int, stop: int) -> int:
    """Bytes to read rows; 0 if no copy is needed. Every lazy step in between takes its share."""
    if isinstance(x, Source) or (isinstance(x, Buffered) and len(x.strips(start, stop)) == 1):
        return 0
    inputs_bytes = 0
    if not isinstance(x, Buffered):
        rows = (start // 2, (stop + 1) // 2) if isinstance(x, Upsampled) else (start, stop)
        inputs_bytes = sum(_read_bytes(array, *rows) for array in x.inputs)
    return inputs_bytes + prod((x.shape[0], stop - start, *x.shape[2:])) * x.dtype.size


_WEIGHT_ARGUMENT: dict[Callable[..., Any], int] = {
    kernels.conv2d: 1,
    kernels.repeat_conv2d: 1,
    kernels.norm_silu_conv2d: 2,
}
"""Position of the weight among the arguments of a convolution."""

_NOT_IN_PLACE = (kernels.upsample_nearest_2x, kernels.leaky_relu)
"""Functions that cannot reuse the memory of their argument."""

_NATIVE = (
    *(*_NOT_IN_PLACE, kernels.group_norm, kernels.rms_norm, kernels.silu, kernels.gelu, kernels.gelu_tanh),
    *(kernels.quick_gelu, kernels.tanh, kernels.sigmoid),
)
"""The same with the extension."""

_AHEAD = 50
"""Tasks that MLX allocates on a CPU ahead of those that run, see also `FREE_RUNNING`."""

_AWAITED = 1 << 20
"""Bytes of a result for which the extension waits until earlier operations are done, see `CpuPrimitive`."""


def _convolution_workspace(shape: Sequence[int], weight: Sequence[int], stride: int = 1) -> int:
    """Workspace (bytes) of a convolution: on a CPU the weights that the extension reorders, or the windows that MLX
    gathers from a copy or two; on Metal and CUDA that of Winograd's algorithm, or a copy of the image."""
    out, *kernel, channels = weight
    if kernels.native_expected():
        return 4 * channels * out * (36 if kernel == [3, 3] and stride == 1 else prod(kernel))
    if is_cpu():
        copies = 1 if stride == 1 else 2
        return 4 * prod(shape) * (copies + prod(-(-n // stride) for n in kernel))
    wide = channels % 32 == 0 and out % 32 == 0 and channels + out >= 256
    if not (wide and kernel == [3, 3] and stride == 1 and prod(shape[:3]) >= 4096):
        return 4 * prod(shape)
    return _winograd_workspace(shape, out)


def _winograd_workspace(shape: Sequence[int], out: int) -> int:
    """Workspace (bytes) of `winograd_conv_2D_gpu` in mlx/backend/metal/conv.cpp: the padded image, and 8 x 8 points of
    inputs and products for each tile of 6 x 6 pixels, and of weights. That of cuDNN is not known."""
    batch, height, width, channels = shape
    rows, columns = -(-height // 6), -(-width // 6)
    padded = batch * (6 * rows + 2) * (6 * columns + 2) * channels
    return 4 * (padded + 64 * (batch * rows * columns * (channels + out) + channels * out))


def _transposed_workspace(shape: Sequence[int], weight: mx.array) -> int:
    """Workspace (bytes) of a transposed convolution: weights of the four phases, reordered from a copy of equal size,
    and the workspace of the convolution."""
    out, _, _, channels = weight.shape
    weights = 4 * 16 * out * channels
    return weights + max(weights, _convolution_workspace(shape, (4 * out, 2, 2, channels)))


def _attention_workspace(shape: Sequence[int]) -> int:
    """Workspace (bytes) of attention: norm, queries, keys, values, output and projection; plus the scores computed at a
    time and their softmax. The extension of a CPU holds the scores of a few queries; MLX alone holds all."""
    batch, height, width, _ = shape
    scores = batch * (height * width) ** 2
    if kernels.native_expected():
        return 4 * 5 * prod(shape)
    return 4 * (6 * prod(shape) + 3 * (scores if is_cpu() else min(scores, kernels.MAX_SCORES)))


def _linear_attention_workspace(shape: Sequence[int]) -> int:
    """Workspace (bytes) of linear attention: queries, keys and values, each with a reordered copy, softmax of the
    keys and the output; plus the channels by channels product of keys and values."""
    return 4 * (8 * prod(shape) + 2 * shape[0] * shape[-1] ** 2)


_ATTENTION_WORKSPACE: dict[Callable[..., Any], Callable[[Sequence[int]], int]] = {
    Attention.__call__: _attention_workspace,
    LinearAttention.__call__: _linear_attention_workspace,
    wan.Attention.__call__: _attention_workspace,
}
"""Workspace of attention layers, as functions of the shape."""
