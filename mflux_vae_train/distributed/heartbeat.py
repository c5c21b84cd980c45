"""TCP connections between the main process and each other one, over which they notice that a process is gone.

Collective operations wait forever for a process that is stopped, asleep or unreachable, they carry no reason for an
exit, and MLX's ring keeps a core busy for each neighbour while it waits. Each end of a connection therefore sends a
sign of life every few seconds and announces its exit, which the main process forwards to all. Before each collective
operation all processes meet at a barrier over these connections; that wait sleeps and can be woken.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.text_files import read_text

INTERVAL = 3.0
"""Seconds between signs of life."""

TIMEOUT = 40.0
"""Seconds of silence after which a process counts as gone."""

_POLL = 1.0
"""Seconds between two checks, at most."""

_CONNECT_TIMEOUT = 15.0
"""Seconds in which all processes must connect."""

_RESOLVE_TIMEOUT = 2.0
"""Seconds for the addresses of a host name. A system may look for an unknown name for half a minute."""

_WELCOME = "welcome"
_READY = b"+"
"""To the main process: the sender waits at the barrier. From it: all processes do."""

_SIGNAL = b"!"
"""Precedes the number of a signal that the sender received."""


@dataclass(frozen=True, kw_only=True)
class PeerExit:
    """A process that no longer takes part.

    Attributes:
        rank: its rank.
        reason: completes "process 2 of 4 ...".
        finished: its work was done; an error only for processes that still wait for it.
    """

    rank: int
    reason: str
    finished: bool = False


class Heartbeat(threading.Thread):
    """Sends and receives in a separate thread until the process ends.

    Args:
        rank: of this process.
        connections: sockets by the rank of the other end: all others for the main process, rank 0 for the others.
        on_exit: called with each process that is gone.
        on_tick: called about once a second.
        own_signal: returns the signal that this process received; 0 for none.
        on_signal: called with a signal that another process received.

    All callbacks run in this thread.
    """

    def __init__(
        self,
        rank: int,
        connections: Mapping[int, socket.socket],
        *,
        on_exit: Callable[[PeerExit], None],
        on_tick: Callable[[], None],
        own_signal: Callable[[], int],
        on_signal: Callable[[int], None],
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._rank, self._connections = rank, dict(connections)
        self._on_exit, self._on_tick, self._own_signal, self._on_signal = on_exit, on_tick, own_signal, on_signal
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._ready, self._peer_left = 0, False

    def barrier(self) -> bool:
        """Wait until all processes call this. Returns False if one of them is gone."""
        if self._rank != 0:
            self._send(_READY)
        expected = len(self._connections)
        with self._changed:
            self._changed.wait_for(lambda: self._ready >= expected or self._peer_left)
            if self._ready < expected:
                return False
            self._ready -= expected
        if self._rank == 0:
            self._send(_READY)
        return True

    def leave(self, reason: str, *, finished: bool) -> None:
        """Announce that this process takes no further part."""
        self._send_exit(PeerExit(rank=self._rank, reason=reason, finished=finished))

    def run(self) -> None:
        last_heard = dict.fromkeys(self._connections, time.monotonic())
        buffers = dict.fromkeys(self._connections, b"")
        last_sent, number, last_poll = 0.0, 0, time.monotonic()
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while True:
                for key, _ in selector.select(_POLL):
                    rank, connection = key.data, self._connections[key.data]
                    try:
                        received = connection.recv(4096)
                    except OSError:
                        received = b""
                    last_heard[rank] = time.monotonic()
                    *messages, buffers[rank] = (buffers[rank] + received).split(b"\n")
                    for message in filter(None, messages):
                        self._handle(message, rank)
                    if not received:
                        selector.unregister(connection)
                        del last_heard[rank]
                        self._peer_exited(PeerExit(rank=rank, reason="ended without a message"), rank)
                # a process that was stopped itself, perhaps together with the others, could not hear anyone
                stopped = max(0.0, time.monotonic() - last_poll - _POLL)
                last_heard = {rank: heard + stopped for rank, heard in last_heard.items()}
                last_poll = time.monotonic()
                for rank in [rank for rank, heard in last_heard.items() if last_poll - heard > TIMEOUT]:
                    del last_heard[rank]
                    self._peer_exited(PeerExit(rank=rank, reason=f"has been silent for {TIMEOUT:.0f} seconds"), rank)
                if self._own_signal() != number:  # announce a change once
                    number = self._own_signal()
                    self._send(_SIGNAL + str(number).encode())
                if time.monotonic() - last_sent > INTERVAL:
                    self._send(b"")
                    last_sent = time.monotonic()
                self._on_tick()

    def _handle(self, message: bytes, rank: int) -> None:
        if message == _READY:
            with self._changed:
                self._ready += 1
                self._changed.notify()
        elif message.startswith(_SIGNAL):
            self._on_signal(int(message.removeprefix(_SIGNAL)))
        else:
            self._peer_exited(PeerExit(**json.loads(message)), rank)

    def _peer_exited(self, peer: PeerExit, source: int) -> None:
        if self._rank == 0:
            self._send_exit(peer, skip=source)
        self._on_exit(peer)
        with self._changed:
            self._peer_left = True
            self._changed.notify()

    def _send_exit(self, peer: PeerExit, *, skip: int | None = None) -> None:
        self._send(json.dumps(asdict(peer)).encode(), skip=skip)

    def _send(self, message: bytes, *, skip: int | None = None) -> None:
        with self._sending:
            for rank, connection in self._connections.items():
                if rank != skip:
                    with suppress(OSError):  # a closed connection shows when it is read
                        connection.sendall(message + b"\n")


def connect(rank: int, size: int, gather: Callable[[Any], list[Any]]) -> tuple[dict[int, socket.socket], int]:
    """Connect the main process with all others.

    Args:
        gather: returns every process's JSON value by rank.

    Returns:
        this process's connections by rank, without failed ones, and the main process's port.
    """
    server = socket.create_server(("", 0)) if rank == 0 else None
    offer: dict[str, Any] = {}
    if server is not None:
        offer = {"addresses": _own_addresses(), "port": server.getsockname()[1], "token": os.urandom(16).hex()}
    offer = gather(offer)[0]
    if server is None:
        connection = _connect_to_main(offer, rank)
        return ({} if connection is None else {0: connection}), offer["port"]
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _CONNECT_TIMEOUT
    while len(connections) < size - 1 and (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        with suppress(OSError, ValueError):
            connection, _ = server.accept()
            connection.settimeout(2.0)
            token, peer = _read_line(connection).split()
            if token == offer["token"]:
                connection.sendall(f"{_WELCOME}\n".encode())
                connections[int(peer)] = connection
            else:
                connection.close()
    server.close()
    return connections, offer["port"]


def _connect_to_main(offer: Mapping[str, Any], rank: int) -> socket.socket | None:
    """None if none of the offered addresses leads to the main process."""
    for address in chain.from_iterable(map(_resolve, offer["addresses"])):
        with suppress(OSError):
            connection = socket.create_connection((address, offer["port"]), timeout=3.0)
            connection.sendall(f"{offer['token']} {rank}\n".encode())
            if _read_line(connection) == _WELCOME:
                connection.settimeout(2.0)
                return connection
            connection.close()
    return None


def _read_line(connection: socket.socket) -> str:
    with connection.makefile("rb", buffering=0) as file:  # unbuffered: the bytes after the line belong to the heartbeat
        return file.readline(200).decode("ascii").strip()


def _own_addresses() -> list[str]:
    """Addresses of this machine, the likeliest first: those given to the launcher."""
    name = socket.gethostname()
    candidates = [os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0], os.environ.get("NCCL_HOST_IP", "")]
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError, SettingsError):
        nodes = json.loads(read_text(os.environ.get("MLX_HOSTFILE", "")))
        candidates += [address.rpartition(":")[0] for address in nodes[0]]
    candidates += [*_resolve(name), name, f"{name}.local", "127.0.0.1"]
    return [address for address in dict.fromkeys(candidates) if address]


def _resolve(name: str) -> list[str]:
    """The IP addresses of a host name, or of an IP address; none if they are not found in time."""
    found: list[str] = []

    def look_up() -> None:
        with suppress(OSError, UnicodeError):  # of names such as "my..mac"
            found.extend(socket.gethostbyname_ex(name)[2])

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_RESOLVE_TIMEOUT)
    return list(found)
