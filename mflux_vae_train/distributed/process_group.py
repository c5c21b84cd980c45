"""Several processes that train as one: who does what, sums over all processes, and an exit that all notice.

The transport is MLX's (`mlx.launch`, with the ring over TCP, JACCL, NCCL or MPI). Every method is collective unless it
says otherwise: all processes call the same methods in the same order. A single process is a group, too.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import accumulate, chain
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.utils.formatting import first_few
from mflux_vae.utils.text_files import read_text
from mflux_vae_train.checkpointing import state
from mflux_vae_train.checkpointing.differences import BY_FILE
from mflux_vae_train.distributed import heartbeat, interrupts
from mflux_vae_train.distributed.messages import ALIGNMENT, Spec, pack, padded_size, spec_of, unpack
from mflux_vae_train.distributed.watchdog import Watchdog, socket_descriptors, time_limit

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

IDLE_WARNING = (
    "%d processes share the %d micro-batches of an update, so some are idle;"
    " set --gradient_accumulation_steps to %d or a multiple, and use a smaller batch"
)
"""For updates with fewer micro-batches than processes."""

BUCKET = 256 * 2**20
"""Bytes that are summed in one message, at most, unless a single array is larger."""

_JOIN_TIMEOUT = 120.0
"""Seconds in which all processes must have found each other."""

_INLINE = 1019
"""Bytes of JSON in the first message of `ProcessGroup.gather`."""


class ProcessGroup:
    """All processes of a run.

    Attributes:
        rank: number of this process.
        size: number of processes.
        is_main: whether this is rank 0, the process that writes files and logs.
        own_signal: the signal that this process received; 0 for none.
        bytes_sent: bytes that this process has sent to its neighbours so far, as the ring sends them.
    """

    def __init__(self, group: mx.distributed.Group | None = None, watchdog: Watchdog | None = None) -> None:
        self._group = group
        self.rank, self.size = (group.rank(), group.size()) if group is not None else (0, 1)
        self.is_main = self.rank == 0
        self.own_signal = self.bytes_sent = 0
        self._signal = 0
        self._watchdog = watchdog or Watchdog(self.size)

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share: every size-th item, by index. Not collective."""
        return items[self.rank :: self.size]

    # signals, see `interrupts`

    def set_signal(self, number: int) -> None:
        """Record the signal that this process received; 0 clears it. Others see it after the next `gather`."""
        self.own_signal = number
        if not number:
            self._signal = 0

    @property
    def signal(self) -> int:
        """The highest signal of any process at the last `gather`: equal in all processes."""
        return self.own_signal if self.size == 1 else self._signal

    # exchange of JSON values

    def gather(self, value: Any) -> list[Any]:
        """Every process's JSON value, by rank."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        head = bytes([self.own_signal]) + len(text).to_bytes(4, "little") + text[:_INLINE].ljust(_INLINE, b"\0")
        heads = self._gather_bytes(head)
        self._signal = max(each[0] for each in heads)
        sizes = [int.from_bytes(each[1:5], "little") for each in heads]
        rest = [b""] * self.size
        if (longest := max(sizes) - _INLINE) > 0:
            rest = self._gather_bytes(text[_INLINE:].ljust(longest, b"\0"))
        return [json.loads((each[5:] + more)[:size]) for each, more, size in zip(heads, rest, sizes, strict=True)]

    def broadcast(self, make: Callable[[], Item]) -> Item:
        """The JSON value that `make` returns in the main process; the others do not call it."""
        value: Item = self.gather(make() if self.is_main else None)[0]
        return value

    def assert_equal(self, value: Mapping[str, Any]) -> None:
        """Check that all processes have equal JSON values under each name, except explanations of others.

        Raises:
            SettingsError: in all processes, naming what differs where.
        """
        values = self.gather({name: one for name, one in value.items() if not name.endswith(BY_FILE)})
        for rank, other in enumerate(values):
            if differences := [
                f"{name} is {other.get(name)!r}, not {values[0].get(name)!r}"
                for name in {**values[0], **other}
                if values[0].get(name) != other.get(name)
            ]:
                where = f"process {rank + 1} of {self.size}"
                raise SettingsError(f"{where} has different data or settings: {first_few(differences, 2)}")

    def all_reduce(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes, by name; a name may be missing in some."""
        parts = self.gather(dict(numbers))
        return {name: sum(part.get(name, 0.0) for part in parts) for name in dict.fromkeys(chain(*parts))}

    # exchange of arrays

    def gather_arrays(self, arrays: Sequence[mx.array]) -> list[list[mx.array]]:
        """Every process's arrays, by rank; their numbers and shapes may differ."""
        if self.size == 1:
            return [list(arrays)]
        specs = self.gather([spec_of(array) for array in arrays])
        sizes = [sum(map(padded_size, each)) for each in specs]
        padding = max(*sizes, ALIGNMENT) - sizes[self.rank]
        message = mx.concatenate([*map(pack, arrays), mx.zeros(padding, mx.uint8)])
        return [unpack(row, each) for row, each in zip(self._all_gather(message), specs, strict=True)]

    def broadcast_arrays(self, make: Callable[[], Mapping[str, mx.array]]) -> dict[str, mx.array]:
        """The named arrays that `make` returns in the main process; the others do not call it."""
        arrays = dict(make()) if self.is_main else {}
        if self.size == 1:
            return arrays
        specs: dict[str, Spec] = self.broadcast(lambda: {name: spec_of(array) for name, array in arrays.items()})
        padding = 0 if self.is_main else sum(map(padded_size, specs.values()))
        message = [mx.concatenate([*map(pack, arrays.values()), mx.zeros(padding + ALIGNMENT, mx.uint8)])]
        self.all_reduce_arrays(message)
        return dict(zip(specs, unpack(message[0], list(specs.values())), strict=True))

    def broadcast_state(self, objects: Mapping[str, state.Stateful]) -> None:
        """Copy the state of named objects from the main process to all others, bit for bit."""
        if self.size == 1:
            return
        arrays, values = state.flatten(objects)
        arrays = self.broadcast_arrays(lambda: arrays)
        values = self.broadcast(lambda: values)
        if not self.is_main:
            state.restore(objects, arrays, values, where="state sent by the main process")

    def map_in_rounds(
        self, items: Sequence[Item], function: Callable[[Item], Sequence[mx.array]]
    ) -> Iterator[tuple[Item, list[mx.array]]]:
        """Yield (item, function(item)) in order in all processes; each round computes one item per process.

        Raises:
            Interrupted: a signal arrived in a round.
        """
        for start in range(0, len(items), self.size):
            members = items[start : start + self.size]

            def compute(members: Sequence[Item] = members) -> list[mx.array]:
                return [array for item in members[self.rank : self.rank + 1] for array in function(item)]

            yield from zip(members, self.gather_arrays(interrupts.interruptible(self, compute)), strict=False)

    def all_reduce_arrays(self, arrays: list[mx.array]) -> None:
        """Replace each array in the list by its sum over all processes, in a few large messages.

        The list is changed in place to release arrays early: memory grows by one message.
        """
        if self.size == 1:
            return
        for members in _buckets(arrays):
            shapes = [arrays[i].shape for i in members]
            one = len(members) == 1
            flat = arrays[members[0]] if one else mx.concatenate([arrays[i].reshape(-1) for i in members])
            mx.eval(flat)
            for i in members:
                arrays[i] = flat
            total = self._all_sum(flat)
            del flat
            parts = [total] if one else mx.split(total, list(accumulate(map(math.prod, shapes)))[:-1])
            for i, part, shape in zip(members, parts, shapes, strict=True):
                arrays[i] = part.reshape(shape)
            mx.eval([arrays[i] for i in members])

    def all_reduce_trees(self, trees: list[Any]) -> list[Any]:
        """Trees of arrays, summed over all processes. Empties the given list to release its arrays early."""
        if self.size == 1:
            return trees
        arrays: list[Any] = [pair[1] for pair in tree_flatten(trees)]
        structure: Any = tree_map(lambda leaf: None, trees)
        trees.clear()
        self.all_reduce_arrays(arrays)
        leaves = iter(arrays)
        summed: list[Any] = tree_map(lambda leaf: next(leaves), structure)
        return summed

    def _gather_bytes(self, row: bytes) -> list[bytes]:
        return [each.tobytes() for each in np.array(self._all_gather(mx.array(np.frombuffer(row, np.uint8))))]

    def _all_sum(self, array: mx.array) -> mx.array:
        with self._watchdog.waiting():
            total = mx.distributed.all_sum(array, group=self._group)
            mx.eval(total)
        self.bytes_sent += 2 * (self.size - 1) * array.nbytes // self.size
        return total

    def _all_gather(self, row: mx.array) -> mx.array:
        """(n,) of each process -> (size, n)."""
        with self._watchdog.waiting():
            rows = mx.distributed.all_gather(row[None], group=self._group)
            mx.eval(rows)
        self.bytes_sent += (self.size - 1) * row.nbytes
        return rows

    # supervision

    def saving(self) -> AbstractContextManager[None]:
        """See `Watchdog.saving`."""
        return self._watchdog.saving()

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tell the other processes about an error that leaves the block."""
        if error is not None:
            self._watchdog.fail(error)

    def start_heartbeat(self) -> None:
        """Have all processes notice when one of them is gone; log a warning if they cannot."""
        connections, port = heartbeat.connect(self.rank, self.size, self.gather)
        if all(self.gather(len(connections) == (self.size - 1 if self.is_main else 1))):
            self._watchdog.start(
                heartbeat.Heartbeat(
                    self.rank,
                    connections,
                    on_exit=self._watchdog.peer_exited,
                    on_tick=self._watchdog.tick,
                    own_signal=lambda: self.own_signal,
                    on_signal=interrupts.forward,
                )
            )
        elif self.is_main:
            logger.warning(
                "not all processes can reach the main one on port %d; if one dies, others may wait forever", port
            )


SINGLE = ProcessGroup()
"""A run of one process."""


@functools.cache
def join() -> ProcessGroup:
    """The processes that a launcher started together with this one; `SINGLE` without a launcher.

    Raises:
        TrainingError: they cannot find each other.
    """
    hostfile = os.environ.get("MLX_HOSTFILE")
    with suppress(OSError):
        if hostfile is not None and not read_text(hostfile).strip():
            return SINGLE  # `mlx.launch -n 1` leaves the file empty, which MLX cannot read
    before = socket_descriptors()
    with time_limit(_JOIN_TIMEOUT, f"the processes did not find each other within {_JOIN_TIMEOUT:.0f} seconds"):
        try:
            group = mx.distributed.init()
            if group.size() == 1:
                return SINGLE
            sockets = sorted(socket_descriptors() - before) if hostfile is not None else []
            processes = ProcessGroup(group, Watchdog(group.size(), sockets))
            processes.start_heartbeat()
        except RuntimeError as error:
            raise TrainingError(f"the processes cannot find each other ({error}); see mlx.launch --verbose") from error
    return processes


def _buckets(arrays: Sequence[mx.array]) -> list[list[int]]:
    """Indices of arrays of one dtype, together at most `BUCKET` bytes, in an order equal in all processes."""
    buckets: list[list[int]] = []
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        size = math.inf
        for i, array in enumerate(arrays):
            if array.dtype == dtype:
                if size + array.nbytes > BUCKET:
                    buckets.append([])
                    size = 0
                buckets[-1].append(i)
                size += array.nbytes
    return buckets
