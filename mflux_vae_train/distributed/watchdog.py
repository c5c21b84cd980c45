"""Waiting for other processes that does not last for ever: an exchange fails when one of them is gone."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from mflux_vae.errors import TrainingError
from mflux_vae_train.distributed.heartbeat import Heartbeat, PeerExit

_GRACE = 2.0
"""Seconds in which a process that waits for one that is gone may find out by itself, as all do of a common error."""

_LAST = 45.0
"""Seconds after which a process that lost another ends, wherever it is."""


class ProcessLost(TrainingError):
    """Another process of the team is gone."""


class Watchdog:
    """Knows whether this process waits for others, and who of them is gone.

    Args:
        size: how many processes there are.
        sockets: file descriptors of the engine's own connections. Shut down, they make it raise in the thread that
            waits, which nothing else wakes. Where the engine has none, as with RDMA, a process that waits in vain ends.
    """

    def __init__(self, size: int, sockets: Sequence[int] = ()) -> None:
        self._size, self._sockets = size, sockets
        self._lifeline: Heartbeat | None = None
        self._gone: PeerExit | None = None
        self._lost: str | None = None
        self._gone_at, self._waiting_since, self._saving = 0.0, 0.0, False

    def begin(self, heartbeat: Heartbeat) -> None:
        """Listen to what the others say, and tell them when this process ends."""
        self._lifeline = heartbeat
        heartbeat.start()
        atexit.register(heartbeat.leave, "has ended before the others", orderly=True)

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error that ends this process; they would wait for it for ever."""
        if self._lifeline is not None:
            why = str(error).partition("\n")[0] or type(error).__name__
            self._lifeline.leave(f"stopped: {why}", orderly=False)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block this process waits for all others.

        Raises:
            ProcessLost: one of them is gone.
        """
        if self._lost is not None or (self._gone is not None and not self._gone.orderly):
            raise ProcessLost(self._lost or self._told(self._gone))
        if self._lifeline is not None and not self._lifeline.meet():
            raise ProcessLost(self._told(self._gone))
        self._waiting_since = time.monotonic()
        try:
            yield
        except RuntimeError as error:  # what the ring says when a connection breaks
            until = time.monotonic() + _GRACE
            while self._lifeline is not None and self._gone is None and time.monotonic() < until:
                time.sleep(0.05)
            self._lost = self._told(self._gone) if self._gone else f"{error}"  # the engine is of no more use
            raise ProcessLost(self._lost) from error
        finally:
            self._waiting_since = 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within the block this process writes what must not be lost: it is not ended because another is gone."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def note(self, gone: PeerExit) -> None:
        """From the lifeline's thread."""
        if self._gone is None or (self._gone.orderly and not gone.orderly):
            self._gone, self._gone_at = gone, time.monotonic()

    def tick(self) -> None:
        """From the lifeline's thread: end what would never end."""
        gone, now, waiting = self._gone, time.monotonic(), self._waiting_since
        if gone is None or self._saving:
            return
        late = now - max(waiting, self._gone_at) if waiting else 0.0
        if late > _GRACE:
            for number in self._sockets:
                with suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
        if late > 3 * _GRACE or (not gone.orderly and now - self._gone_at > _LAST):
            _end(f"{self._told(gone)}; this one ends, too")

    def _told(self, gone: PeerExit | None) -> str:
        return "" if gone is None else f"process {gone.rank + 1} of {self._size} {gone.why}"


@contextmanager
def at_most(seconds: float, why: str) -> Iterator[None]:
    """A block that, after so many seconds, ends the process, saying why."""
    done = threading.Event()

    def give_up() -> None:
        if not done.wait(seconds):
            _end(why)

    threading.Thread(target=give_up, name="at most", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def socket_descriptors() -> set[int]:
    """File descriptors of this process's sockets."""
    found = set()
    for number in [int(name) for name in os.listdir("/dev/fd")]:
        with suppress(OSError):  # the listing's own is closed by now
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                found.add(number)
    return found


def _end(why: str) -> None:
    """End this process from a thread, as the main one waits in MLX and cannot be woken."""
    logging.shutdown()
    print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(TrainingError.exit_code)
