"""SIGINT and SIGTERM: the first ends a run as soon as nothing is lost by it, a second one at once.

An update is finished and saved (`loop.fit`). What changes nothing that a checkpoint keeps - drawing a picture, a
validation, an encoding - is left where it is, as it can be made again.
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
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mflux_vae_train.distributed.process_group import ProcessGroup

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. What was finished is kept: of updates, where there is a way to, in a checkpoint.

    Attributes:
        exit_code: what a command line should exit with: 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP.
        update: updates made; None where it was not at updates.
    """

    def __init__(self, signum: int, update: int | None = None, *, saved: bool = True) -> None:
        said = f"interrupted by {signal.Signals(signum).name}"
        if update is None:
            said += "; what was finished is kept"
        else:
            kept = "a checkpoint was written" if saved else "no checkpoint was asked for"
            said += f" after update {update}; {kept}"
        super().__init__(said)
        self.exit_code = 128 + signum
        self.update = update


class _Here(threading.local):
    """What a signal does to this thread. Python's handlers are called in the main one."""

    handling = False
    ends = False


_here = _Here()

_handled: set[int] = set()
"""Signals that are noted at the moment."""


@contextmanager
def handling(processes: ProcessGroup) -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM is the team's flag; then signals have their default effect again.

    A process that is alone is ended by it, but for what is `deferred`; of several all end together, after the next
    update or within `interruptible` work. Several also note SIGHUP, which those on other machines get where the
    launcher is
    interrupted: their ssh ends. The SIGTERM that may follow is not taken for a second wish, and nobody reads what is
    said from then on. Within another such block, and outside of the main thread, this does nothing.

    Raises:
        Interrupted: a signal came.
    """
    if _here.handling:
        yield
        return
    processes.raise_flag(0)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if processes.size > 1 and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        processes.raise_flag(number)
        if number == signal.SIGHUP:
            for stream in (sys.stdout, sys.stderr):
                if stream.isatty():
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        else:
            _handled.clear()
            for each in before:
                signal.signal(each, signal.SIG_DFL)
            with suppress(RuntimeError):  # it came while something was being said: no more can be said now
                logger.warning(
                    "%s: stopping as soon as nothing is lost by it; again to stop at once", signal.Signals(number).name
                )
        if _here.ends:
            raise Interrupted(number)

    for number in before:
        signal.signal(number, note)
    _handled.update(numbers)
    _here.handling = True
    try:
        with _ending(processes.size == 1):
            yield
    finally:
        _here.handling = _here.ends = False
        _handled.clear()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


def deferred() -> AbstractContextManager[None]:
    """A block that a signal does not end, but for `interruptible` work in it; the team's flag tells of it."""
    return _ending(False)


def forward(number: int) -> None:
    """Has the main thread do what it does at a signal, which another process got; 0 is none. Not a second time."""
    identity = threading.main_thread().ident
    if number in _handled and identity is not None:
        signal.pthread_kill(identity, number)


def interruptible(processes: ProcessGroup, work: Callable[[], Result]) -> Result:
    """What the work returns, unless a signal to any process comes: then all leave it, together.

    Args:
        work: changes nothing that a checkpoint keeps, can be made again, and waits for no other process.

    Raises:
        Interrupted: a signal came.
    """
    found: list[Result] = []
    with suppress(Interrupted), _ending(True):
        if not processes.flagged:
            found.append(work())
    processes.gather("done")
    if processes.flag:
        raise Interrupted(processes.flag)
    return found[0]


@contextmanager
def _ending(ends: bool) -> Iterator[None]:
    before, _here.ends = _here.ends, ends
    try:
        yield
    finally:
        _here.ends = before
