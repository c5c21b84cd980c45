"""Several processes that train as one: who does what, sums over all of them, and an end that all of them notice.

The engine is MLX's own (`mlx.launch`, with the ring over TCP, JACCL, NCCL or MPI below it). Everything here is
collective: all processes call the same methods in the same order. One process alone is a team, too.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae_train.checkpointing import state
from mflux_vae_train.distributed import heartbeat, interrupts
from mflux_vae_train.distributed.heartbeat import Heartbeat
from mflux_vae_train.distributed.interrupts import interruptible
from mflux_vae_train.distributed.messages import ALIGNED, Form, as_bytes, form_of, room_of, split
from mflux_vae_train.distributed.watchdog import Watchdog, at_most, socket_descriptors

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

IDLE_WARNING = (
    "%d processes share the %d micro-batches of an update, and some have nothing to do:"
    " give --gradient_accumulation_steps %d or a multiple, and a smaller batch"
)
"""What to say where an update has fewer micro-batches than there are processes."""

BUCKET = 256 * 2**20
"""Bytes that are summed in one message, at most, unless a single array is larger."""

_MEETING = 120.0
"""Seconds in which all processes must have found each other."""

_ROOM = 1019
"""Bytes of JSON that go with the first message of `ProcessGroup.gather`."""


class ProcessGroup:
    """All processes of a run.

    Attributes:
        rank: number of this process; the first, 0, is the one that writes and speaks.
        size: how many there are.
        sent: bytes that this process has handed to its neighbours so far, counted as the ring sends them.
    """

    def __init__(self, group: mx.distributed.Group | None = None, watchdog: Watchdog | None = None) -> None:
        self._group = group
        self.rank, self.size = (group.rank(), group.size()) if group is not None else (0, 1)
        self.sent = 0
        self._watchdog = watchdog or Watchdog(self.size)
        self._own_flag = self._flag = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    # who does what

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """What falls to this process: every size-th item, by index."""
        return items[self.rank :: self.size]

    def broadcast(self, make: Callable[[], Item]) -> Item:
        """What the first process makes, a plain JSON value; the others do not even try."""
        value: Item = self.gather(make() if self.is_main else None)[0]
        return value

    def assert_equal(self, value: Mapping[str, Any]) -> None:
        """See that all processes have the same, a mapping to plain JSON values.

        Raises:
            SettingsError: in all processes, naming what differs where.
        """
        all_of_them = self.gather(dict(value))
        for rank, other in enumerate(all_of_them):
            names = [name for name in {**all_of_them[0], **other} if all_of_them[0].get(name) != other.get(name)]
            if names:
                told = "; ".join(f"{name} is {other.get(name)!r}, not {all_of_them[0].get(name)!r}" for name in names)
                raise SettingsError(f"process {rank + 1} of {self.size} has other data or settings: {told}")

    def raise_flag(self, flag: int) -> None:
        """Set this process's flag, 0 to 255. It reaches the others with the next `gather`."""
        self._own_flag = flag
        if not flag:
            self._flag = 0

    @property
    def flag(self) -> int:
        """The highest flag of any process at the last `gather`: the same in all of them."""
        return self._own_flag if self.size == 1 else self._flag

    @property
    def flagged(self) -> bool:
        """Whether this process has raised its flag, told or not."""
        return self._own_flag != 0

    # exchange

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, plain JSON, by rank."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        head = bytes([self._own_flag]) + len(text).to_bytes(4, "little") + text[:_ROOM].ljust(_ROOM, b"\0")
        heads = self._gather_bytes(head)
        self._flag = max(each[0] for each in heads)
        sizes = [int.from_bytes(each[1:5], "little") for each in heads]
        rest = [b""] * self.size
        if (longest := max(sizes) - _ROOM) > 0:
            rest = self._gather_bytes(text[_ROOM:].ljust(longest, b"\0"))
        return [json.loads((each[5:] + more)[:size]) for each, more, size in zip(heads, rest, sizes, strict=True)]

    def all_reduce(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """By name, sums over all processes; a name may be missing in some."""
        parts = self.gather(dict(numbers))
        return {name: sum(part.get(name, 0.0) for part in parts) for name in dict.fromkeys(chain(*parts))}

    def gather_arrays(self, arrays: Sequence[mx.array]) -> list[list[mx.array]]:
        """Every process's arrays, by rank: any number of any shapes."""
        if self.size == 1:
            return [list(arrays)]
        forms = self.gather([form_of(array) for array in arrays])
        sizes = [sum(map(room_of, each)) for each in forms]
        rest = max(*sizes, ALIGNED) - sizes[self.rank]
        content = mx.concatenate([*map(as_bytes, arrays), mx.zeros(rest, mx.uint8)])
        return [split(row, each) for row, each in zip(self._all_gather(content), forms, strict=True)]

    def broadcast_arrays(self, make: Callable[[], Mapping[str, mx.array]]) -> dict[str, mx.array]:
        """The arrays that the first process makes, by name, in all; the others do not even try."""
        own = dict(make()) if self.is_main else {}
        if self.size == 1:
            return own
        forms: dict[str, Form] = self.broadcast(lambda: {name: form_of(array) for name, array in own.items()})
        if self.is_main:
            content = [mx.concatenate([*map(as_bytes, own.values()), mx.zeros(ALIGNED, mx.uint8)])]
        else:
            content = [mx.zeros(sum(map(room_of, forms.values())) + ALIGNED, mx.uint8)]
        self.all_reduce_arrays(content)
        return dict(zip(forms, split(content[0], list(forms.values())), strict=True))

    def map_in_rounds(
        self, items: Sequence[Item], make: Callable[[Item], Sequence[mx.array]]
    ) -> Iterator[tuple[Item, list[mx.array]]]:
        """What is made of each item, in order and in all processes; as many are in the making as there are of these.

        Raises:
            Interrupted: a signal came while they were being made.
        """
        for start in range(0, len(items), self.size):
            now = items[start : start + self.size]
            mine = now[self.rank : self.rank + 1]
            own = interruptible(self, partial(_made, make, mine))
            yield from zip(now, self.gather_arrays(own), strict=False)

    def all_reduce_arrays(self, arrays: list[mx.array]) -> None:
        """Put in place of each array its sum over all processes, in a few large messages.

        In place, so that none is kept twice: what goes into a message is let go of before the next is made.
        """
        if self.size == 1:
            return
        for members in _buckets(arrays):
            one = len(members) == 1
            flat = arrays[members[0]] if one else mx.concatenate([arrays[i].reshape(-1) for i in members])
            mx.eval(flat)
            shapes = [arrays[i].shape for i in members]
            for i in members:
                arrays[i] = flat
            total = self._all_sum(flat)
            del flat
            ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()
            parts = [total] if one else mx.split(total, ends)
            for i, part, shape in zip(members, parts, shapes, strict=True):
                arrays[i] = part.reshape(shape)
            mx.eval([arrays[i] for i in members])

    def all_reduce_trees(self, trees: list[Any]) -> list[Any]:
        """Trees of arrays, summed over all processes. The given list is emptied, so that theirs can be let go of."""
        if self.size == 1:
            return trees
        arrays: list[Any] = [pair[1] for pair in tree_flatten(trees)]
        forms: Any = tree_map(lambda leaf: None, trees)
        trees.clear()
        self.all_reduce_arrays(arrays)
        coming = iter(arrays)
        summed: list[Any] = tree_map(lambda leaf: next(coming), forms)
        return summed

    def broadcast_state(self, objects: Mapping[str, state.Stateful]) -> None:
        """Give named objects in all processes the state that they have in the first, to the bit."""
        if self.size == 1:
            return
        arrays, values = state.flatten(objects)
        arrays = self.broadcast_arrays(lambda: arrays)
        values = self.broadcast(lambda: values)
        if not self.is_main:
            state.restore(objects, arrays, values, where="what the first process sent")

    def _gather_bytes(self, row: bytes) -> list[bytes]:
        return [each.tobytes() for each in np.array(self._all_gather(mx.array(np.frombuffer(row, np.uint8))))]

    def _all_sum(self, array: mx.array) -> mx.array:
        with self._watchdog.waiting():
            total = mx.distributed.all_sum(array, group=self._group)
            mx.eval(total)
        self.sent += 2 * (self.size - 1) * array.nbytes // self.size
        return total

    def _all_gather(self, row: mx.array) -> mx.array:
        """(n,) of each process -> (size, n)."""
        with self._watchdog.waiting():
            rows = mx.distributed.all_gather(row[None], group=self._group)
            mx.eval(rows)
        self.sent += (self.size - 1) * row.nbytes
        return rows

    # an end that all notice

    def saving(self) -> AbstractContextManager[None]:
        """See `Watchdog.saving`."""
        return self._watchdog.saving()

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An error on its way out is told to the others."""
        if error is not None:
            self._watchdog.fail(error)

    def start_heartbeats(self) -> None:
        """Have all processes notice when one of them is gone; where they cannot, say so."""
        server, offer = heartbeat.offered() if self.is_main else (None, None)
        offer = self.gather(offer)[0]
        if server is not None:
            lines = heartbeat.accepted(server, offer, self.size - 1)
        else:
            line = heartbeat.connected(offer, self.rank)
            lines = {} if line is None else {0: line}
        if all(self.gather(len(lines) == (self.size - 1 if self.is_main else 1))):
            told: dict[str, Any] = {"flag": lambda: self._own_flag, "flagged": interrupts.forward}
            self._watchdog.begin(
                Heartbeat(self.rank, lines, gone=self._watchdog.note, tick=self._watchdog.tick, **told)
            )
        elif self.is_main:
            logger.warning(
                "not all processes can reach the first one on port %d: one that dies may leave others waiting",
                offer["port"],
            )


SINGLE = ProcessGroup()
"""One process."""


@functools.cache
def join() -> ProcessGroup:
    """The processes that a launcher started together with this one; `SINGLE` where none did.

    Raises:
        TrainingError: they do not find each other.
    """
    hostfile = os.environ.get("MLX_HOSTFILE")
    with suppress(OSError):
        if hostfile is not None and not Path(hostfile).read_text(encoding="utf-8").strip():
            return SINGLE  # `mlx.launch -n 1` leaves it empty, which MLX cannot read
    before = socket_descriptors()
    with at_most(_MEETING, f"the processes did not find each other in {_MEETING:.0f} seconds"):
        try:
            group = mx.distributed.init()
            if group.size() == 1:
                return SINGLE
            sockets = sorted(socket_descriptors() - before) if hostfile is not None else []
            all_of_us = ProcessGroup(group, Watchdog(group.size(), sockets))
            all_of_us.start_heartbeats()
        except RuntimeError as error:
            raise TrainingError(f"the processes do not find each other ({error}): see mlx.launch --verbose") from error
    return all_of_us


def _buckets(arrays: Sequence[mx.array]) -> list[list[int]]:
    """Numbers of arrays of one dtype, together at most `BUCKET` bytes, in an order that is the same everywhere."""
    found: list[list[int]] = []
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        members: list[int] = []
        size = 0
        for i in (i for i, array in enumerate(arrays) if array.dtype == dtype):
            if members and size + arrays[i].nbytes > BUCKET:
                found.append(members)
                members, size = [], 0
            members.append(i)
            size += arrays[i].nbytes
        if members:
            found.append(members)
    return found


def _made(make: Callable[[Item], Sequence[mx.array]], items: Sequence[Item]) -> list[mx.array]:
    return [array for item in items for array in make(item)]
