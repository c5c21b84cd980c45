"""Compute outputs in chunks, on every core and in bounded memory, for the CPU.

MLX's graph fixes dependencies but not their order: given a hundred chunks, it would run the first step of all of them,
then the second, and keep every result of a step in memory. All its operations except matrix products use one core.
Outside of traces, the large operations of this package are therefore evaluated eagerly: a few chunks at a time, each
on a separate stream (and thus core), written in place into the output. The buffers that a chunk frees are reused by
the next one while they are still in the core's cache.
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
"""Computes one chunk."""

CHUNK_ELEMENTS = 1 << 20
"""Elements per chunk of a pointwise operation: two or three such arrays stay in or near a core's cache."""
_MAX_CACHED_BYTES = 32 << 20
_ASYNC_MAX_BYTES = 4 << 20
"""Largest result evaluated asynchronously while `overlapping`; larger chunks profit from cached buffers."""
_MAP_BATCH_ROWS = 512
"""Rows of samples per call in `map_batch`: fewer give thin matrices, more take more memory."""


class _Local(threading.local):
    """State of a thread, and its last default stream outside of chunks."""

    stream: mx.Stream | None = None
    deferred = False
    in_map_batch = False
    overlapping = False


_local = _Local()


def is_eager(*arrays: mx.array) -> bool:
    """Whether to evaluate results eagerly: on a CPU, outside of traces, `deferred` and `map_batch`.

    Starts to evaluate the arguments.
    """
    if _local.deferred or _local.in_map_batch or not device.is_cpu():
        return False
    try:
        mx.async_eval(*arrays)  # raises ValueError inside `mx.grad`, `mx.compile` and similar
    except ValueError:
        return False
    return True


def can_fuse(*arrays: mx.array) -> bool:
    """Whether to use compiled formulas: if results are evaluated eagerly, and inside `map_batch`."""
    return _local.in_map_batch or is_eager(*arrays)


@contextmanager
def _flag_set(flag: str) -> Iterator[None]:
    """Set a flag of this thread: `deferred`, `in_map_batch` or `overlapping`."""
    before = getattr(_local, flag)
    setattr(_local, flag, True)
    try:
        yield
    finally:
        setattr(_local, flag, before)


def deferred() -> AbstractContextManager[None]:
    """Context in which nothing is evaluated eagerly, for callers that only need shapes."""
    return _flag_set("deferred")


@contextmanager
def overlapping() -> Iterator[None]:
    """Context that evaluates small results asynchronously while Python builds the next ones.

    Matrix products use one thread each, as in chunks.
    """
    if device.is_cpu():
        mx.synchronize()  # see `_one_product_per_core`
    with _flag_set("overlapping"), device.one_blas_thread():
        try:
            yield
        finally:
            for stream in _streams():
                mx.synchronize(stream)


def is_deferred() -> bool:
    """Whether this thread is within `deferred`."""
    return _local.deferred


def _evaluate(*arrays: mx.array) -> None:
    """Evaluate now, or asynchronously if small and `overlapping`."""
    asynchronous = _local.overlapping and max(array.nbytes for array in arrays) <= _ASYNC_MAX_BYTES
    (mx.async_eval if asynchronous else mx.eval)(*arrays)


@threads.exclusive()
def fill_parallel(y: mx.array, chunks: Iterable[tuple[Any, Chunk]]) -> mx.array:
    """Write each chunk to its index of `y`; returns y.

    Args:
        y: must have no other reference, or every chunk copies the whole array.
        chunks: (index into y, function that computes it); functions are called in order, results computed in
            parallel.
    """
    _trim_cache(y.nbytes)
    _evaluate(y)
    with _one_product_per_core():
        for group in _stream_groups(chunks):
            for stream, (index, chunk) in group:
                with mx.stream(stream):
                    y[index] = chunk()
            _evaluate(y)
    return y


@threads.exclusive()
def sum_parallel(chunks: Iterable[Chunk]) -> mx.array:
    """Sum the results of chunks; each core accumulates separately.

    Args:
        chunks: at least one, all of one shape; computed as in `fill_parallel`.
    """
    sums: dict[int, mx.array] = {}
    with _one_product_per_core():
        for group in _stream_groups(chunks):
            for place, (stream, chunk) in enumerate(group):
                with mx.stream(stream):
                    sums[place] = sums[place] + chunk() if place in sums else chunk()
            _evaluate(*sums.values())
    first, *others = sums.values()
    return sum(others, first)


@threads.exclusive()
def map_batch(function: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
    """function(*arrays), computed for a few samples at a time on each core, if evaluated eagerly.

    For networks of many small operations: each part runs all of them on one core without waiting for the others.

    Args:
        function: maps arrays to an array, sample by sample along the first axis.
        arrays: the first is (B, L, ...); others with batch size 1 are broadcast.
    """
    batch, length = arrays[0].shape[:2]
    if batch == 1 or streams() == 1 or not is_eager(*arrays):
        return function(*arrays)
    mx.eval(arrays)  # else a stream would wait for another one's inputs
    outputs: list[mx.array] = []
    parts = slices(batch, max(1, min(-(-batch // streams()), _MAP_BATCH_ROWS // length)))
    try:
        with _one_product_per_core():
            for group in _stream_groups(parts):
                with _flag_set("in_map_batch"):
                    results = []
                    for stream, samples in group:
                        with mx.stream(stream):
                            results.append(function(*(a if a.shape[0] == 1 else a[samples] for a in arrays)))
                mx.eval(results)
                outputs += results
    except ValueError:  # `function` uses an array of a trace
        return function(*arrays)
    return mx.concatenate(outputs)


T = TypeVar("T")


def run_parallel(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Run tasks in parallel, one per core, and yield their results in order.

    For CPU graphs of many small operations, whose matrix products are too small for several threads.

    Args:
        tasks: each builds a tree of arrays that does not depend on the other tasks.
    """
    for group in _stream_groups(tasks):
        with threads.exclusive(), _one_product_per_core():  # not while the caller has the results
            results = []
            for stream, task in group:
                with mx.stream(stream):
                    results.append(task())
            mx.eval(results)
        yield from results


def _stream_groups(chunks: Iterable[T]) -> Iterator[list[tuple[mx.Stream, T]]]:
    """Group items into one per stream, each with its stream."""
    streams, remaining = _streams(), iter(chunks)
    while group := list(zip(streams, islice(remaining, len(streams)), strict=False)):
        yield group


def _one_product_per_core() -> AbstractContextManager[None]:
    """Context in which a matrix product uses one thread, as the chunks of a group are computed side by side."""
    if _local.overlapping or streams() == 1:
        return nullcontext()
    mx.synchronize()  # changing the thread count of a running product would change its rounding
    return device.one_blas_thread()


def _trim_cache(needed: int) -> None:
    """Clear a large cache: MLX reuses buffers only for similar sizes, so those of other layers stay unused."""
    if mx.get_cache_memory() > needed + _MAX_CACHED_BYTES:
        mx.clear_cache()


def split_pixels(batch: int, pixels: int, channels: int) -> tuple[list[slice], list[slice]]:
    """Split (batch, pixels, channels) into chunks of at most `CHUNK_ELEMENTS`: slices of images and of pixels."""
    if batch >= streams() and pixels * channels <= CHUNK_ELEMENTS:
        images = min(-(-batch // streams()), CHUNK_ELEMENTS // (pixels * channels))
        return slices(batch, images), [slice(0, pixels)]
    return slices(batch, 1), slices(pixels, min(-(-pixels // streams()), max(1, CHUNK_ELEMENTS // channels)))


def map_chunks(chunk: Callable[[slice, slice], mx.array], shape: tuple[int, ...]) -> mx.array:
    """Fill an array (B, N, C) with chunk(images, pixels) for each chunk."""
    batch, pixels, channels = shape
    images, parts = split_pixels(batch, pixels, channels)
    return fill_parallel(
        mx.zeros(shape), (((samples, part), partial(chunk, samples, part)) for samples in images for part in parts)
    )


def slices(length: int, size: int) -> list[slice]:
    """Slices of `size` items; the last one may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def streams() -> int:
    """Number of chunks computed in parallel."""
    return threads.stream_count()


def _streams() -> list[mx.Stream]:
    """One stream per core: the current default stream, then those shared by all threads.

    Within a chunk, whose default stream is one of the latter, the first one is that of the caller.
    """
    current, shared = mx.default_stream(mx.cpu), threads.parallel_streams(streams() - 1)
    if _local.stream is None or current not in shared:
        _local.stream = current
    return [_local.stream, *shared]
