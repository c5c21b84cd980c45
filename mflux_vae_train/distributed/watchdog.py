"""Ends the wait for other processes when one of them is gone."""

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

from mflux_vae.errors import DeviceError, TrainingError
from mflux_vae.runtime.device_errors import device_error
from mflux_vae_train.distributed.heartbeat import Heartbeat, PeerExit

_GRACE = 2.0
"""Grace period (s) before a waiting process is woken: an error that all share reaches each of them by itself."""

_EXIT_TIMEOUT = 45.0
"""Seconds after which a process ends that lost another, unless it is saving."""


class ProcessLost(TrainingError):
    """Another process of the run is gone."""


class Watchdog:
    """Records whether this process waits for others and which of them is gone.

    Args:
        size: number of processes.
        sockets: file descriptors of MLX's own connections. Shutting them down makes the collective operation raise in
            the thread that waits; nothing else wakes it. Without sockets, as with RDMA, a process that waits in vain
            is ended.
    """

    def __init__(self, size: int, sockets: Sequence[int] = ()) -> None:
        self._size, self._sockets = size, sockets
        self._heartbeat: Heartbeat | None = None
        self._peer: PeerExit | None = None
        self._lost: str | None = None
        self._exit_time, self._waiting_since, self._saving = 0.0, 0.0, False

    def start(self, heartbeat: Heartbeat) -> None:
        """Listen to the other processes, and tell them when this one ends."""
        self._heartbeat = heartbeat
        heartbeat.start()
        atexit.register(heartbeat.leave, "ended before the others", finished=True)

    def fail(self, error: BaseException) -> None:
        """Tell the other processes about an error that ends this one."""
        if self._heartbeat is not None:
            shown = error.but(kept="") if isinstance(error, DeviceError) else error  # others keep what they have
            reason = str(shown).partition("\n")[0] or type(error).__name__
            self._heartbeat.leave(f"stopped: {reason}", finished=False)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block this process waits for all others.

        Raises:
            ProcessLost: one of them is gone.
            DeviceError: this process's device failed.
        """
        if self._lost is not None or (self._peer is not None and not self._peer.finished):
            raise ProcessLost(self._lost or self._describe(self._peer))
        if self._heartbeat is not None and not self._heartbeat.barrier():
            raise ProcessLost(self._describe(self._peer))
        self._waiting_since = time.monotonic()
        try:
            yield
        except RuntimeError as error:  # raised by the ring when a connection breaks
            if (failure := device_error(error)) is not None:
                raise failure from error
            deadline = time.monotonic() + _GRACE
            while self._heartbeat is not None and self._peer is None and time.monotonic() < deadline:
                time.sleep(0.05)
            self._lost = self._describe(self._peer) or str(error)  # no further collective operation is possible
            raise ProcessLost(self._lost) from error
        finally:
            self._waiting_since = 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within the block this process is not ended, so that it can write a checkpoint."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def peer_exited(self, peer: PeerExit) -> None:
        """Called from the heartbeat's thread."""
        if self._peer is None or (self._peer.finished and not peer.finished):
            self._peer, self._exit_time = peer, time.monotonic()

    def tick(self) -> None:
        """Called from the heartbeat's thread: end a wait that would never end."""
        peer, now, waiting = self._peer, time.monotonic(), self._waiting_since
        if peer is None or self._saving:
            return
        late = now - max(waiting, self._exit_time) if waiting else 0.0
        if late > _GRACE:
            for descriptor in self._sockets:
                with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
        if late > 3 * _GRACE or (not peer.finished and now - self._exit_time > _EXIT_TIMEOUT):
            _end_process(f"{self._describe(peer)}; this process ends, too")

    def _describe(self, peer: PeerExit | None) -> str:
        return "" if peer is None else f"process {peer.rank + 1} of {self._size} {peer.reason}"


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """End this process with a message if the block takes longer."""
    timer = threading.Timer(seconds, _end_process, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def socket_descriptors() -> set[int]:
    """File descriptors of this process's sockets."""
    descriptors = set()
    for number in [int(name) for name in os.listdir("/dev/fd")]:
        with suppress(OSError):  # the directory's own descriptor is closed by now
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                descriptors.add(number)
    return descriptors


def _end_process(message: str) -> None:
    """Exit from another thread: the main one may wait in MLX, where it cannot be woken."""
    logging.shutdown()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(TrainingError.exit_code)
