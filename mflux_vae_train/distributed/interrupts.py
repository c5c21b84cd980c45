"""SIGINT and SIGTERM: the first one stops a run as soon as nothing is lost, a second one terminates the process.

An optimizer update is finished and saved (`loop.fit`). Work that no checkpoint stores, such as a preview, a validation
or an encoding, is abandoned and repeated when the run continues.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any, Protocol, TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Processes(Protocol):
    """The part of `ProcessGroup` that this module uses."""

    size: int
    own_signal: int

    @property
    def signal(self) -> int: ...
    def set_signal(self, number: int) -> None: ...
    def gather(self, value: Any) -> list[Any]: ...


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run. Finished work is kept; finished updates are in a checkpoint if the run writes any.

    Attributes:
        exit_code: exit status for a command line: 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP.
        update: number of updates made; None outside the training loop.
    """

    def __init__(self, number: int, update: int | None = None, *, saved: bool = True) -> None:
        kept = "finished work is kept"
        if update is not None:
            kept = "a checkpoint was saved; the same command resumes" if saved else "no checkpoint was requested"
        where = "" if update is None else f" after update {update}"
        super().__init__(f"interrupted by {signal.Signals(number).name}{where}; {kept}")
        self.exit_code = 128 + number
        self.update = update


class _ThreadState(threading.local):
    """Python calls signal handlers in the main thread only."""

    handling = False
    interruptible = False


_thread = _ThreadState()

_handled: set[int] = set()
"""Signals that `handling` currently records."""


@contextmanager
def handling(processes: Processes) -> Iterator[None]:
    """Record the first SIGINT or SIGTERM within the block; a second one terminates the process.

    A single process raises at once, except in `deferred` blocks. Several processes stop together, after the next update
    or within `interruptible` work. Several processes also record SIGHUP: remote ones receive it when the launcher's ssh
    ends. A SIGTERM that follows a SIGHUP does not count as the second signal, and terminal output is discarded from
    then on. Nested blocks and blocks outside the main thread do nothing.

    Raises:
        Interrupted: a signal arrived.
    """
    if _thread.handling:
        yield
        return
    processes.set_signal(0)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if processes.size > 1 and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in numbers}

    def record(number: int, frame: FrameType | None) -> None:
        processes.set_signal(number)
        if number == signal.SIGHUP:
            for stream in (sys.stdout, sys.stderr):
                if stream.isatty():
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        else:
            _handled.clear()
            for each in previous:
                signal.signal(each, signal.SIG_DFL)
            with suppress(RuntimeError):  # the signal arrived while a stream was being written
                logger.warning(
                    "%s: stopping as soon as nothing is lost; send it again to stop at once",
                    signal.Signals(number).name,
                )
        if _thread.interruptible:
            raise Interrupted(number)

    for number in numbers:
        signal.signal(number, record)
    _handled.update(numbers)
    _thread.handling = True
    try:
        with _interruptible(processes.size == 1):
            yield
    finally:
        _thread.handling = _thread.interruptible = False
        _handled.clear()
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


def deferred() -> AbstractContextManager[None]:
    """A block in which a signal is recorded in `processes.signal` and raises only within `interruptible` work."""
    return _interruptible(False)


def forward(number: int) -> None:
    """Deliver a signal that another process received to the main thread, once; 0 means none."""
    identity = threading.main_thread().ident
    if number in _handled and identity is not None:
        signal.pthread_kill(identity, number)


def interruptible(processes: Processes, work: Callable[[], Result]) -> Result:
    """Return the result of `work`, unless any process receives a signal: then all processes abandon it together.

    Args:
        work: changes nothing that a checkpoint stores, can be repeated, and waits for no other process.

    Raises:
        Interrupted: a signal arrived.
    """
    results: list[Result] = []
    with suppress(Interrupted), _interruptible(True):
        if not processes.own_signal:
            results.append(work())
    processes.gather("done")
    if processes.signal:
        raise Interrupted(processes.signal)
    return results[0]


@contextmanager
def _interruptible(value: bool) -> Iterator[None]:
    before, _thread.interruptible = _thread.interruptible, value
    try:
        yield
    finally:
        _thread.interruptible = before
