"""A network's own code on an image too large for it: layer by layer, in strips of rows, to the untiled result.

`run(network.decode, latents, pixels)` calls the network with a stand-in for the array. The network's functions note
what they would compute (`mflux_vae.overriding`) instead of computing it; the notes are then worked off strip by strip:

- Convolutions, sums and whatever a norm takes its statistics of are *held*: computed in order from top to bottom,
  each row once, and dropped as soon as nothing below asks for it again.
- What acts on each pixel alone, and nearest-neighbour upsampling, is *passed through*: computed when it is read.
- A norm needs all of its input first: its statistics are taken from every strip as it is computed, then merged.
- Anything else, such as attention, gets its input whole.

So a network without norms streams through a few rows per layer, and one with norms holds what one norm sees, without
the several copies that computing a layer takes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mflux_vae import kernels
from mflux_vae.layers import repeat_pixels
from mflux_vae.overriding import is_pointwise, pointwise

_BELOW_ALL = 1 << 40


class Job:
    """What the stand-ins of one run share.

    Attributes:
        pixels: of a strip, at the resolution of what is computed.
        evaluate: called with arrays that are needed now; `mx.eval`, or something that only keeps count.
        normed: what norms take statistics of, in the order of the network's code.
    """

    def __init__(self, pixels: int, evaluate: Callable[..., None] = mx.eval):
        self.pixels = pixels
        self.evaluate = evaluate
        self.normed: list[Held] = []


def run(function: Callable[[mx.array], Any], x: mx.array, pixels: int) -> Any:
    """`function(x)` for one image x (1, H, W, C), in strips of about `pixels` pixels: an array, or a tuple of them."""
    job = Job(pixels)
    answer: Any = function(Source(job, x))  # type: ignore[arg-type]
    several = isinstance(answer, tuple)
    results = [Held(job, _first, [value]) for value in (answer if several else (answer,))]
    for held in job.normed:  # in their order, so that none has to call for the one before
        held.advance(held.shape[1])
    arrays = tuple(result.rows(0, result.shape[1]) for result in results)
    return arrays if several else arrays[0]


class Stand:
    """Stands in for an array (B, H, W, C); a subclass knows how to compute some of its rows."""

    ndim = 4

    def __init__(self, job: Job, shape: Sequence[int], dtype: mx.Dtype, inputs: Sequence[Stand] = ()):
        self.job, self.shape, self.dtype, self.inputs = job, tuple(shape), dtype, inputs

    def rows(self, start: int, stop: int) -> mx.array:
        """Rows start to stop, start <= stop <= H."""
        raise NotImplementedError

    def release(self, reader: int, start: int) -> None:
        """`reader` will not ask for rows above `start` any more; with 0, said first: it is going to ask."""
        for stand in self.inputs:
            stand.release(reader, start)

    def __mlx_function__(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Stand:
        if function is kernels.conv2d:
            return Convolution(self.job, *arguments, **named)
        if function is kernels.group_norm:
            return GroupNorm(self.job, *arguments, **named)
        if function is repeat_pixels:
            return Repeated(self)
        return _applied(self.job, function, arguments, named)

    def astype(self, dtype: mx.Dtype) -> Stand:
        return self if dtype == self.dtype else _applied(self.job, _astype, (self, dtype), {})

    def __getitem__(self, index: Any) -> Stand:
        dots, channels = index  # (..., start:stop)
        if dots is not Ellipsis or channels.step is not None:
            raise TypeError(f"an image in strips gives a range of its channels, x[..., start:stop], not x[{index}]")
        return _applied(self.job, _channels, (self, channels.start, channels.stop), {})

    def __add__(self, other: Any) -> Stand:
        return _applied(self.job, _add, (self, other), {})

    def __sub__(self, other: Any) -> Stand:
        return _applied(self.job, _subtract, (self, other), {})

    def __mul__(self, other: Any) -> Stand:
        return _applied(self.job, _multiply, (self, other), {})

    def __truediv__(self, other: Any) -> Stand:
        return _applied(self.job, _divide, (self, other), {})

    __radd__, __rmul__ = __add__, __mul__


class Source(Stand):
    """The image itself."""

    def __init__(self, job: Job, x: mx.array):
        super().__init__(job, x.shape, x.dtype)
        self._x = x

    def rows(self, start: int, stop: int) -> mx.array:
        return self._x[:, start:stop]


class Pointwise(Stand):
    """What a function makes of each pixel."""

    def __init__(self, job: Job, function: Callable[..., mx.array], inputs: Sequence[Stand]):
        example = function(*(_example(stand, rows=1) for stand in inputs))
        height, (batch, _, width, channels) = inputs[0].shape[1], example.shape
        super().__init__(job, (batch, height, width, channels), example.dtype, inputs)
        self._function = function

    def rows(self, start: int, stop: int) -> mx.array:
        return self._function(*(stand.rows(start, stop) for stand in self.inputs))


class Repeated(Stand):
    """Every pixel four times."""

    def __init__(self, x: Stand):
        batch, height, width, channels = x.shape
        super().__init__(x.job, (batch, 2 * height, 2 * width, channels), x.dtype, [x])

    def rows(self, start: int, stop: int) -> mx.array:
        first = start // 2
        repeated = repeat_pixels(self.inputs[0].rows(first, (stop + 1) // 2))
        return repeated[:, start - 2 * first : stop - 2 * first]

    def release(self, reader: int, start: int) -> None:
        super().release(reader, start // 2)


class Held(Stand):
    """Computed from top to bottom, each row once, by a function of the inputs' same rows; kept while it is read."""

    def __init__(self, job: Job, function: Callable[..., mx.array], inputs: Sequence[Stand]):
        pointwise = Pointwise(job, function, inputs)
        self._hold(job, pointwise.shape, pointwise.dtype, inputs)
        self._function = function

    def _hold(self, job: Job, shape: Sequence[int], dtype: mx.Dtype, inputs: Sequence[Stand]) -> None:
        super().__init__(job, shape, dtype, inputs)
        self.step = max(job.pixels // self.shape[2], 1)
        self.in_its_stead: list[Held] = []
        self._strips: list[tuple[int, mx.array]] = []
        self._done = 0
        self._needed: dict[int, int] = {}
        self._groups: int | None = None
        self._statistics: list[tuple[int, mx.array, mx.array]] = []
        super().release(id(self), 0)

    def compute(self, start: int, stop: int) -> mx.array:
        """Rows start to stop from the inputs'."""
        return self._function(*(stand.rows(start, stop) for stand in self.inputs))

    def input_row(self, row: int) -> int:
        """The first row of the inputs that rows from `row` on need."""
        return row

    def advance(self, stop: int) -> None:
        """Compute the rows above `stop` that are not computed yet."""
        while self._done < min(stop, self.shape[1]):
            start, self._done = self._done, min(self._done + self.step, self.shape[1])
            strip = self.compute(start, self._done)
            self._strips.append((start, strip))
            if self._groups is not None:
                self._statistics.append((strip.shape[1], *kernels.group_norm_statistics(strip, self._groups)))
                self.job.evaluate(strip, *self._statistics[-1][1:])
            else:
                self.job.evaluate(strip)
            super().release(id(self), self.input_row(self._done) if self._done < self.shape[1] else _BELOW_ALL)

    def rows(self, start: int, stop: int) -> mx.array:
        self.advance(stop)
        pieces = [
            x[:, max(start - at, 0) : stop - at] for at, x in self._strips if start < at + x.shape[1] and at < stop
        ]
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)

    def release(self, reader: int, start: int) -> None:
        self._needed[reader] = start
        if start:
            for held in self.in_its_stead:
                held.advance(start)
            needed = min(self._needed.values())
            self._strips = [(at, x) for at, x in self._strips if at + x.shape[1] > needed]

    @property
    def watched(self) -> bool:
        """Whether a norm has asked for statistics."""
        return self._groups is not None

    def watch(self, groups: int) -> None:
        """Take statistics of the strips, over all rows, for a group norm."""
        self._groups = groups
        self.job.normed.append(self)

    def statistics(self) -> tuple[mx.array, mx.array]:
        """Mean and variance of each group, spread over its channels: (1, C) each, float32 (Chan et al. 1979)."""
        self.advance(self.shape[1])
        if len(self._statistics) > 1:
            rows, means, variances = zip(*self._statistics, strict=True)
            share = (mx.array(rows, mx.float32) / self.shape[1])[:, None, None]
            mean = (mx.stack(means) * share).sum(axis=0)
            variance = ((mx.stack(variances) + mx.square(mx.stack(means) - mean)) * share).sum(axis=0)
            self._statistics = [(self.shape[1], mean, variance)]
        return self._statistics[0][1:]


class Convolution(Held):
    """`kernels.conv2d`."""

    def __init__(
        self,
        job: Job,
        x: Stand,
        weight: mx.array,
        bias: mx.array | None = None,
        *,
        stride: int = 1,
        padding: kernels.Padding = 0,
    ):
        (top, _), self._sides = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        example = kernels.conv2d(_example(x), weight, bias, stride=stride, padding=padding)
        self._parameters, self._stride, self._top = (weight, bias), stride, top
        self._hold(job, example.shape, example.dtype, [x])
        self.step = max(self.step // stride**2, 1)
        narrows = self.shape[1:3] == x.shape[1:3] and weight.shape[1] == 1 and self.shape[3] < x.shape[3]
        if narrows and isinstance(x, Held):  # then it is the one to keep for later
            x.in_its_stead.append(self)

    def compute(self, start: int, stop: int) -> mx.array:
        (x,), (weight, bias) = self.inputs, self._parameters
        first, end = self.input_row(start, clip=False), self.input_row(stop - 1, clip=False) + weight.shape[1]
        rows = x.rows(max(first, 0), min(end, x.shape[1]))
        self.job.evaluate(rows)
        padding = ((max(-first, 0), max(end - x.shape[1], 0)), self._sides)
        return kernels.conv2d(rows, weight, bias, stride=self._stride, padding=padding)

    def input_row(self, row: int, clip: bool = True) -> int:
        first = row * self._stride - self._top
        return max(first, 0) if clip else first


class GroupNorm(Stand):
    """`kernels.group_norm` with statistics of all rows."""

    def __init__(self, job: Job, x: Stand, groups: int, weight: mx.array, bias: mx.array, eps: float):
        held = x if isinstance(x, Held) and not x.watched else Held(job, _first, [x])
        super().__init__(job, x.shape, x.dtype, [held])
        held.watch(groups)
        self._held, self._parameters = held, (weight, bias, eps)

    def rows(self, start: int, stop: int) -> mx.array:
        return kernels.group_norm_apply(self._held.rows(start, stop), *self._held.statistics(), *self._parameters)


class Whole(Held):
    """What a function makes of whole arrays."""

    def __init__(self, job: Job, function: Callable[..., mx.array], inputs: Sequence[Stand]):
        example = function(*(_example(stand) for stand in inputs))
        self._hold(job, example.shape, example.dtype, inputs)
        self.step = self.shape[1]
        self._function = function

    def compute(self, start: int, stop: int) -> mx.array:
        return self._function(*(stand.rows(0, stand.shape[1]) for stand in self.inputs))


def _applied(job: Job, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Stand:
    """A call with stand-ins among its arguments."""
    given = (*arguments, *named.values())
    stands = [value for value in given if isinstance(value, Stand)]

    def call(*arrays: mx.array) -> Any:
        left = iter(arrays)
        values = [next(left) if isinstance(value, Stand) else value for value in given]
        return function(*values[: len(arguments)], **dict(zip(named, values[len(arguments) :], strict=True)))

    differs_by_row = any(isinstance(value, mx.array) and value.ndim > 2 and value.shape[-3] > 1 for value in given)
    if differs_by_row or not is_pointwise(function):
        return Whole(job, call, stands)
    return Pointwise(job, call, stands) if len(stands) == 1 else Held(job, call, stands)


def _example(stand: Stand, rows: int | None = None) -> mx.array:
    """An array of a stand-in's shape, never computed: what functions make of it has the shape of their results."""
    batch, height, width, channels = stand.shape
    return mx.zeros((batch, rows or height, width, channels), stand.dtype)


_add, _subtract, _multiply, _divide = map(pointwise, (operator.add, operator.sub, operator.mul, operator.truediv))


@pointwise
def _astype(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype)


@pointwise
def _channels(x: mx.array, start: int | None, stop: int | None) -> mx.array:
    return x[..., start:stop]


def _first(x: mx.array) -> mx.array:
    return x
