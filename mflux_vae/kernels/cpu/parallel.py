"""An output computed in bands, on every core and in bounded memory, for the CPU.

MLX's graph says what depends on what, not when: of a hundred bands it would run all first steps, then all second
ones, and every step's results would lie in memory at once. And all its operations but matrix products run on one
core. So where nothing differentiates or traces, the large operations of this package do not only describe their
result, they compute it: a few bands at a time, each on a stream (and so a core) of its own, written in place into
the output. What a band leaves behind in the buffer cache the next one uses while it is still in the core's cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx

from mflux_vae.runtime import device, threads

Chunk: TypeAlias = Callable[[], mx.array]
"""What computes one."""

CHUNK_ELEMENTS = 1 << 20
"""Elements of a band of which each element makes one: two or three such arrays stay in a core's cache, or near it."""
_MAX_CACHED_BYTES = 32 << 20
_ASYNC_MAX_BYTES = 4 << 20
"""Of what is computed soon while `overlapping`: larger bands find each other's memory in the core's cache."""
_MAP_BATCH_ROWS = 512
"""Of samples that are computed together: fewer make thin matrices, more take more memory."""


class _Local(threading.local):
    """What this thread is doing, and its default stream."""

    stream: mx.Stream | None = None
    deferred = False
    in_map_batch = False
    overlapping = False


_local = _Local()


def is_eager(*arrays: mx.array) -> bool:
    """Whether results are computed at once: on a CPU, where no argument is part of a trace, unless `deferred`.

    The arguments' own computation begins. Not within a part of `map_batch`, which is computed as a whole.
    """
    if _local.deferred or _local.in_map_batch or not device.is_cpu():
        return False
    try:
        mx.async_eval(*arrays)  # refuses what `mx.grad`, `mx.compile` and the like are tracing
    except ValueError:
        return False
    return True


def can_fuse(*arrays: mx.array) -> bool:
    """Whether formulas are compiled: where results are computed at once, and within a part of `map_batch`."""
    return _local.in_map_batch or is_eager(*arrays)


@contextmanager
def _flag_set(flag: str) -> Iterator[None]:
    """This thread is `deferred`, `within` or `overlapping`."""
    before = getattr(_local, flag)
    setattr(_local, flag, True)
    try:
        yield
    finally:
        setattr(_local, flag, before)


def deferred() -> AbstractContextManager[None]:
    """Within it nothing is computed before it is asked for, whatever its size: for who only wants to know shapes."""
    return _flag_set("deferred")


@contextmanager
def overlapping() -> Iterator[None]:
    """Within it small results are computed while the next ones are described, for who asks for many in a row.

    The time between two of them is then not lost; products use one thread, as bands' do.
    """
    with _flag_set("overlapping"), device.one_blas_thread():
        try:
            yield
        finally:
            for stream in _streams():
                mx.synchronize(stream)


def _evaluate(*arrays: mx.array) -> None:
    """Now, or soon."""
    asynchronous = _local.overlapping and max(array.nbytes for array in arrays) <= _ASYNC_MAX_BYTES
    (mx.async_eval if asynchronous else mx.eval)(*arrays)


@threads.exclusive()
def fill_parallel(y: mx.array, chunks: Iterable[tuple[Any, Chunk]]) -> mx.array:
    """`y` with each band written where its index says.

    Args:
        y: no other reference to it may exist, or every band costs a copy of the whole.
        bands: (index into y, what to put there); the functions are called one after the other, their results
            computed side by side.
    """
    _trim_cache(y.nbytes)
    _evaluate(y)
    for group in _stream_groups(chunks):
        for stream, (index, chunk) in group:
            with mx.stream(stream):
                y[index] = chunk()
        _evaluate(y)
    return y


@threads.exclusive()
def sum_parallel(chunks: Iterable[Chunk]) -> mx.array:
    """The sum of what bands make; each core adds up its own.

    Args:
        bands: at least one, with results of one shape; computed as those of `filled`.
    """
    sums: dict[int, mx.array] = {}
    for group in _stream_groups(chunks):
        for place, (stream, chunk) in enumerate(group):
            with mx.stream(stream):
                sums[place] = sums[place] + chunk() if place in sums else chunk()
        _evaluate(*sums.values())
    first, *others = sums.values()
    return sum(others, first)


@threads.exclusive()
def map_batch(function: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
    """function(*arrays), a few samples at a time on each core where results are computed at once.

    For a network's many small operations: a part goes through all of them on its own core, and waits for no other.

    Args:
        function: of arrays whose first axis are samples, none of which depends on another; so is its result.
        arrays: the first (B, L, ...); of others, those with a first axis of length 1 are for all samples.
    """
    batch, length = arrays[0].shape[:2]
    if batch == 1 or streams() == 1 or not is_eager(*arrays):
        return function(*arrays)
    mx.eval(arrays)  # or one stream would wait for what another one computes besides
    outputs: list[mx.array] = []
    try:
        for group in _stream_groups(slices(batch, max(1, min(-(-batch // streams()), _MAP_BATCH_ROWS // length)))):
            with _flag_set("in_map_batch"):
                results = []
                for stream, samples in group:
                    with mx.stream(stream):
                        results.append(function(*(a if a.shape[0] == 1 else a[samples] for a in arrays)))
            mx.eval(results)
            outputs += results
    except ValueError:  # what `function` uses besides is part of a trace
        return function(*arrays)
    return mx.concatenate(outputs)


T = TypeVar("T")


def run_parallel(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What tasks answer, in their order: as many computed at a time as there are cores, each on one of its own.

    For graphs of many small operations, on a CPU: their products are too small for several threads.

    Args:
        tasks: each describes arrays, in any nesting, that take nothing from another's.
    """
    for group in _stream_groups(tasks):
        with threads.exclusive():
            results = []
            for stream, task in group:
                with mx.stream(stream):
                    results.append(task())
            mx.eval(results)
        yield from results


def _stream_groups(chunks: Iterable[T]) -> Iterator[list[tuple[mx.Stream, T]]]:
    """As many at a time as there are streams, each with its own."""
    streams, remaining = _streams(), iter(chunks)
    single_threaded = _local.overlapping or len(streams) == 1
    if not single_threaded:
        mx.synchronize()  # a product under way would have now these, now those threads, and other last digits
    with nullcontext() if single_threaded else device.one_blas_thread():
        while group := list(zip(streams, islice(remaining, len(streams)), strict=False)):
            yield group


def _trim_cache(needed: int) -> None:
    """MLX gives a buffer only to what is as large: those of other layers would just lie there."""
    if mx.get_cache_memory() > needed + _MAX_CACHED_BYTES:
        mx.clear_cache()


def split_pixels(batch: int, pixels: int, channels: int) -> tuple[list[slice], list[slice]]:
    """How to cut (batch, pixels, channels) into bands of at most `PIECE` elements: images, and pixels of each."""
    if batch >= streams() and pixels * channels <= CHUNK_ELEMENTS:
        images = min(-(-batch // streams()), CHUNK_ELEMENTS // (pixels * channels))
        return slices(batch, images), [slice(0, pixels)]
    return slices(batch, 1), slices(pixels, min(-(-pixels // streams()), max(1, CHUNK_ELEMENTS // channels)))


def map_chunks(chunk: Callable[[slice, slice], mx.array], shape: tuple[int, ...]) -> mx.array:
    """An array (B, N, C) of what `band` makes of each piece: of which images, which of their pixels."""
    batch, pixels, channels = shape
    images, parts = split_pixels(batch, pixels, channels)
    return fill_parallel(
        mx.zeros(shape), (((samples, part), partial(chunk, samples, part)) for samples in images for part in parts)
    )


def slices(length: int, size: int) -> list[slice]:
    """Slices of so many each, the last one maybe of fewer."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def streams() -> int:
    """How many bands are computed side by side."""
    return threads.stream_count()


def _streams() -> list[mx.Stream]:
    """One for each core: this thread's default one, then those that all threads share."""
    if _local.stream is None:
        _local.stream = mx.default_stream(mx.cpu)
    return [_local.stream, *threads.parallel_streams(streams() - 1)]
