"""Use from several threads: lazily read weights, shared streams, and the end of a thread.

MLX binds a stream to the thread that created it. An array that is not computed yet belongs to its stream, so another
thread that needs it gets "There is no Stream(cpu, 0) in current thread". Three rules follow:

- Weights are read on a stream that every thread may use (`portable`).
- Public methods run one at a time and start computing what they return (`thread_safe`). On a CPU a call uses all cores
  anyway.
- A thread that used MLX calls `mx.clear_streams` before it ends, as MLX asks. Otherwise the destructor of its random
  state takes Python's lock when the thread is already gone for Python. If the main thread exits meanwhile, Python up
  to 3.12 ends the thread inside that destructor, and the process aborts ("terminate called without an active
  exception"). The longer the destructors before it take, the likelier that is: rare after a few operations, nearly
  certain after `mx.compile`, whose cache is destroyed first.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx

from mflux_vae.errors import InputError
from mflux_vae.runtime import device
from mflux_vae.runtime.device_errors import device_error

_FOREIGN = "There is no Stream"
"""Start of MLX's message about an array that only another thread can compute."""

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.RLock()
_streams: dict[mx.DeviceType, mx.Stream] = {}


class _Cleanup:
    """Clears the streams of its thread when the thread ends."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def __del__(self, current: Any = threading.get_ident, clear: Any = mx.clear_streams) -> None:
        if current() == self.thread:  # not where another thread drops it, as Python does at exit
            clear()


class _Thread(threading.local):
    """Lives as long as a thread: Python drops it before anybody who waits for the thread goes on."""

    def __init__(self) -> None:
        self.cleanup = None if threading.current_thread() is threading.main_thread() else _Cleanup()


_thread = _Thread()
atexit.register(mx.clear_streams)  # in the main thread
if not device.is_cpu() and threading.current_thread() is threading.main_thread():
    # MLX takes the first thread it runs in for the main one, whose `clear_streams` clears shared GPU streams, too
    mx.synchronize(mx.cpu)


@contextmanager
def exclusive() -> Iterator[None]:
    """Let no other thread compute meanwhile. May be nested; also a decorator."""
    _ = _thread.cleanup  # which is created now if this is the first time in this thread
    with _lock:
        yield


def thread_safe(function: Callable[P, T]) -> Callable[P, T]:
    """Run one call at a time, and return arrays that every thread may use.

    The function raises InputError if it needs an array that another thread described and did not compute, and
    DeviceError if the device runs out of memory or fails while it computes (on a GPU possibly later, as MLX's error).

    Args:
        function: returns arrays, or a tuple, list, mapping or dataclass of arrays. They are computed on a CPU and
            scheduled on a GPU, but not inside `mx.grad`, `mx.compile` and the like.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with exclusive(), _stream_for(args, kwargs):
                result = function(*args, **kwargs)
                _compute(result)
                return result
        except RuntimeError as error:
            if (failure := device_error(error)) is not None:
                raise failure from error
            if _FOREIGN not in str(error):
                raise
            cure = "call mx.eval on arguments and weights in the thread that created them"
            raise InputError(f"an array of another thread is not computed yet; {cure}") from error

    return call


def _stream_for(*arguments: Any) -> AbstractContextManager[None]:
    """On a CPU, compute calls of other threads than the main one on a stream that they share.

    MLX keeps one system thread for every stream, and a BLAS library one for every core and every stream that multiplies
    matrices. A server with a thread for each request would collect them. Traced arrays stay on the thread's default
    stream: the caller computes them, and not within `exclusive`.
    """
    if _thread.cleanup is None or not device.is_cpu() or not _begin(arguments):
        return nullcontext()
    return portable()


def _compute(result: Any) -> None:
    """Compute the arrays on a CPU, schedule them on a GPU, unless they are traced."""
    if _begin(result) and device.is_cpu():
        mx.eval(list(_arrays(result)))


def _begin(tree: Any) -> bool:
    """Schedule the arrays of a tree; False if some are traced."""
    try:
        mx.async_eval(list(_arrays(tree)))
    except ValueError:
        return False
    return True


def _arrays(tree: Any) -> Iterator[mx.array]:
    """Those of nested modules, mappings, sequences and dataclasses."""
    if isinstance(tree, mx.array):
        yield tree
        return
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        is_instance = is_dataclass(tree) and not isinstance(tree, type)
        tree = [getattr(tree, field.name) for field in fields(tree)] if is_instance else ()
    for part in tree:
        yield from _arrays(part)


@contextmanager
def portable() -> Iterator[None]:
    """Let any thread compute the arrays that are described in this block. Also a decorator.

    Whoever computes them does so within `exclusive`.
    """
    before = [mx.default_stream(kind) for kind in {mx.cpu, mx.default_device().type}]
    try:
        for stream in before:
            mx.set_default_stream(_shared(stream.device.type))
        yield
    finally:
        for stream in before:
            mx.set_default_stream(stream)


def _shared(kind: mx.DeviceType) -> mx.Stream:
    """The stream of `portable`."""
    with exclusive():
        if kind not in _streams:
            _streams[kind] = mx.new_thread_unsafe_stream(kind)
        return _streams[kind]
