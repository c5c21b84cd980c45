"""A line between the first of several processes and each other one, over which they notice when one is gone.

Collective operations wait for ever for a process that is stopped, asleep or behind a pulled cable, none of them
carries a word of why a process ended, and the ring keeps a core busy for each neighbour while it waits. So each end of
a line says something every few seconds, says when it leaves and why, which the first process passes on to all, and all
meet over their lines before each operation, in a wait that sleeps and can be ended.
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
from pathlib import Path
from typing import Any

BEAT = 3.0
"""Seconds between signs of life."""

SILENCE = 40.0
"""Seconds without one after which a process counts as gone."""

_TICK = 1.0
"""Seconds that listening takes, at most, before other things are looked at."""

_PATIENCE = 15.0
"""Seconds for all lines to be made."""

_WELCOME = "welcome"

_HERE = b"+"
"""From another process to the first: it waits at the next meeting; and back: all do."""

_FLAG = b"!"
"""Before the number of a signal that a process got."""


@dataclass(frozen=True, kw_only=True)
class PeerExit:
    """A process that no longer takes part.

    Attributes:
        rank: its number.
        why: what to say of it, such as "ended without a word".
        orderly: it had done its work; only somebody who still waits for it needs to know.
    """

    rank: int
    why: str
    orderly: bool = False


class Heartbeat(threading.Thread):
    """Listens and speaks in a thread of its own, until the process ends.

    Args:
        rank: of this process.
        lines: sockets by the rank at the other end: of the first process to all others, of these to the first.
        gone: called with everyone who is gone, from this thread.
        tick: called about once a second, from this thread.
        flag: what the others are to be told that this process was signalled; 0 for nothing.
        flagged: called with what another process was signalled, from this thread.
    """

    def __init__(
        self,
        rank: int,
        lines: Mapping[int, socket.socket],
        *,
        gone: Callable[[PeerExit], None],
        tick: Callable[[], None],
        flag: Callable[[], int] = lambda: 0,
        flagged: Callable[[int], None] = lambda number: None,
    ) -> None:
        super().__init__(name="lifeline", daemon=True)
        self._rank, self._lines, self._gone, self._tick = rank, dict(lines), gone, tick
        self._flag, self._flagged = flag, flagged
        self._speaking = threading.Lock()
        self._news = threading.Condition()
        self._here, self._left = 0, False

    def meet(self) -> bool:
        """Wait until all processes are in a call of this; False where one of them is gone."""
        if self._rank != 0:
            self._send(_HERE)
        wanted = len(self._lines)
        with self._news:
            self._news.wait_for(lambda: self._here >= wanted or self._left)
            if self._here < wanted:
                return False
            self._here -= wanted
        if self._rank == 0:
            self._send(_HERE)
        return True

    def leave(self, why: str, *, orderly: bool) -> None:
        """Tell the others that this process takes no further part."""
        self._say(PeerExit(rank=self._rank, why=why, orderly=orderly))

    def run(self) -> None:
        """See `threading.Thread`."""
        heard = dict.fromkeys(self._lines, time.monotonic())
        rest = dict.fromkeys(self._lines, b"")
        said, flag, awake = 0.0, 0, time.monotonic()
        with selectors.DefaultSelector() as selector:
            for rank, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, rank)
            while True:
                for key, _ in selector.select(_TICK):
                    rank, line = key.data, self._lines[key.data]
                    try:
                        new = line.recv(4096)
                    except OSError:
                        new = b""
                    heard[rank] = time.monotonic()
                    *messages, rest[rank] = (rest[rank] + new).split(b"\n")
                    for message in filter(None, messages):
                        if message == _HERE:
                            with self._news:
                                self._here += 1
                                self._news.notify()
                        elif message.startswith(_FLAG):
                            self._flagged(int(message.removeprefix(_FLAG)))
                        else:
                            self._pass_on(PeerExit(**json.loads(message)), rank)
                    if not new:
                        selector.unregister(line)
                        del heard[rank]
                        self._pass_on(PeerExit(rank=rank, why="ended without a word"), rank)
                # while it is stopped itself, maybe together with the others, it hears nobody
                stopped = max(0.0, time.monotonic() - awake - _TICK)
                heard = {rank: last + stopped for rank, last in heard.items()}
                awake = time.monotonic()
                for rank in [rank for rank, last in heard.items() if awake - last > SILENCE]:
                    del heard[rank]
                    self._pass_on(PeerExit(rank=rank, why=f"has been silent for {SILENCE:.0f} seconds"), rank)
                if self._flag() != flag:  # the first process passes on what it is told, as its own flag then
                    flag = self._flag()
                    self._send(_FLAG + str(flag).encode())
                if time.monotonic() - said > BEAT:
                    self._send(b"")
                    said = time.monotonic()
                self._tick()

    def _pass_on(self, gone: PeerExit, heard_from: int) -> None:
        if self._rank == 0:
            self._say(gone, but=heard_from)
        self._gone(gone)
        with self._news:
            self._left = True
            self._news.notify()

    def _say(self, gone: PeerExit, *, but: int | None = None) -> None:
        self._send(json.dumps(asdict(gone)).encode(), but=but)

    def _send(self, message: bytes, *, but: int | None = None) -> None:
        with self._speaking:
            for rank, line in self._lines.items():
                if rank != but:
                    with suppress(OSError):  # nobody there: reading notices, too
                        line.sendall(message + b"\n")


def offered() -> tuple[socket.socket, dict[str, Any]]:
    """A socket on which the first process waits for the others, and what they must know to find it."""
    server = socket.create_server(("", 0))
    return server, {"addresses": _addresses(), "port": server.getsockname()[1], "token": os.urandom(16).hex()}


def accepted(server: socket.socket, offer: Mapping[str, Any], count: int) -> dict[int, socket.socket]:
    """The lines that `count` others made, by rank; fewer where some did not come in time."""
    lines: dict[int, socket.socket] = {}
    until = time.monotonic() + _PATIENCE
    while len(lines) < count and (left := until - time.monotonic()) > 0:
        server.settimeout(left)
        with suppress(OSError, ValueError):
            line, _ = server.accept()
            line.settimeout(2.0)
            token, rank = _line_from(line).split()
            if token == offer["token"]:
                line.sendall(f"{_WELCOME}\n".encode())
                lines[int(rank)] = line
            else:
                line.close()
    server.close()
    return lines


def connected(offer: Mapping[str, Any], rank: int) -> socket.socket | None:
    """A line to the process that made the offer; None where none of its addresses leads there."""
    for address in offer["addresses"]:
        with suppress(OSError):
            line = socket.create_connection((address, offer["port"]), timeout=3.0)
            line.sendall(f"{offer['token']} {rank}\n".encode())
            if _line_from(line) == _WELCOME:
                line.settimeout(2.0)
                return line
            line.close()
    return None


def _line_from(line: socket.socket) -> str:
    with line.makefile("rb", buffering=0) as file:  # not a byte more: what follows belongs to the one who listens
        return file.readline(200).decode("ascii").strip()


def _addresses() -> list[str]:
    """Under which others may reach this machine, the likeliest first: what the launcher was told of it."""
    name = socket.gethostname()
    candidates = [os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0], os.environ.get("NCCL_HOST_IP", "")]
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
        nodes = json.loads(Path(os.environ.get("MLX_HOSTFILE", "")).read_text(encoding="utf-8"))
        candidates += [address.rpartition(":")[0] for address in nodes[0]]
    with suppress(OSError):
        candidates += socket.gethostbyname_ex(name)[2]
    candidates += [name, f"{name}.local", "127.0.0.1"]
    return [address for address in dict.fromkeys(candidates) if address]
