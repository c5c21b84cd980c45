"""Tasks of the processes in `test_distributed`.

``python -m tests.mflux_vae_train.distributed.worker TASK FOLDER``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.networks.layers import BatchNorm, batch_statistics, fold_statistics
from mflux_vae_train.checkpointing import checkpoint, state
from mflux_vae_train.distributed import heartbeat, interrupts, process_group, watchdog
from mflux_vae_train.distributed.interrupts import Interrupted
from mflux_vae_train.distributed.process_group import ProcessGroup
from mflux_vae_train.distributed.watchdog import ProcessLost
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.training.ema import EMA
from mflux_vae_train.training.hooks import Hook, MetricsLog, Record
from mflux_vae_train.training.loop import fit
from mflux_vae_train.training.lr_schedule import learning_rate
from mflux_vae_train.training.step import MicroBatch, Step
from tests.mflux_vae_train.training.tiny_model import Net, batch, loss

TOTAL = 6

WINDOWS: dict[str, list[list[int]]] = {
    "even": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "ragged": [[0, 1], [2, 3], [4]],
    "one": [[0, 1, 2]],
}
"""Samples in the micro-batches of an update; with "one" only the main process has any."""


class Normed(nn.Module):
    """A network whose forward pass changes running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = Net(), BatchNorm(3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.net(x))


def normed_loss(model: nn.Module, arrays: Any) -> Any:
    value = loss(model, arrays)
    fold_statistics(model, batch_statistics(model))
    return value


class Run:
    """A training with all objects of a checkpoint.

    Args:
        folder: for checkpoints and metrics.
        broken: update in which the loss of the last micro-batch is not finite.
    """

    def __init__(
        self, processes: ProcessGroup, folder: Path, windows: list[list[int]], *, broken: int | None = None
    ) -> None:
        self.processes, self.folder, self.windows, self.broken = processes, folder, windows, broken
        self.net = Normed()
        self.net.train()
        optimizer = AdamW(epsilon=1e-4)  # rounding alone must not decide where a gradient is nearly zero
        self.ema = EMA(self.net.trainable_parameters(), decay=0.5)
        self.step = Step(
            self.net, optimizer, normed_loss, ema=self.ema, buffers=True, max_grad_norm=0.5, processes=processes
        )
        self.objects = {
            "parameters": state.parameters(self.net),
            "buffers": state.buffers(self.net),
            "optimizer": state.tree_state(optimizer.state),
            "ema": state.tree_state(self.ema.state),
        }

    def batches(self, update: int) -> list[MicroBatch]:
        micro = [batch(samples, update) for samples in self.windows]
        if update == self.broken:
            micro[-1] = MicroBatch(arrays={**micro[-1].arrays, "y": micro[-1].arrays["y"] * float("nan")}, weight=1)
        return list(self.processes.shard(micro))

    def save(self, updates: int) -> None:
        if self.processes.is_main:
            checkpoint.save(self.folder, updates, self.objects)

    def train(self, *, hooks: list[Hook] | None = None) -> None:
        """From the newest checkpoint of the main process, if there is one."""
        found = self.processes.broadcast(lambda: str(checkpoint.latest(self.folder) or ""))
        start = self.processes.broadcast(lambda: checkpoint.load(found, self.objects) if found else 0)
        self.processes.broadcast_state(self.objects)
        with ExitStack() as stack:
            observers: list[Hook] = []
            if self.processes.is_main:
                observers.append(stack.enter_context(MetricsLog(self.folder / "metrics.jsonl", resumed_at=start)))
            fit(
                step=self.step,
                batches=self.batches,
                learning_rate=learning_rate(peak=1e-2, total=TOTAL, warmup=2, shape="cosine"),
                total=TOTAL,
                start=start,
                observers=observers,
                hooks=hooks or [],
                checkpoint=self.save,
                processes=self.processes,
            )

    def arrays(self) -> dict[str, np.ndarray]:
        tree = {name: one.read() for name, one in self.objects.items()}
        return {path: np.array(array) for path, array in tree_flatten(tree)}


def at(update: int, do: Any) -> Hook:
    return lambda record: do() if record.update == update else None


def note(processes: ProcessGroup, folder: Path, content: Any) -> None:
    (folder / f"{processes.rank}.json").write_text(json.dumps(content))


def train(processes: ProcessGroup, folder: Path, *names: str) -> None:
    """Train with some kinds of window; each process writes its state."""
    process_group.BUCKET = 256  # several messages
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        run = Run(processes, folder / name, WINDOWS[name])
        run.train()
        np.savez(folder / name / f"{processes.rank}.npz", **run.arrays())  # type: ignore[arg-type]


def exchange(processes: ProcessGroup, folder: Path) -> None:
    """All exchanges of a process group."""
    own = [mx.full((processes.rank, 2), 7, mx.bfloat16), mx.arange(processes.rank, dtype=mx.uint8)]
    tree = {"x": mx.array([-0.0, 1.5]) if processes.is_main else mx.zeros(2), "n": 3 if processes.is_main else 0}
    made: list[str] = []

    def make(item: str) -> list[mx.array]:
        made.append(item)
        return [mx.array([ord(item), processes.rank])]

    processes.broadcast_state({"tree": state.tree_state(tree)})
    total = [mx.array(1.0 + processes.rank), mx.ones((2, 3), mx.int32)]
    sent = processes.bytes_sent
    processes.all_reduce_arrays(total)
    sent = processes.bytes_sent - sent
    try:
        processes.assert_equal({"data": "a", "seed": int(processes.rank == processes.size - 1)})
        differs = ""
    except SettingsError as error:
        differs = str(error)
    content = {
        "gathered": processes.gather({"rank": processes.rank, "text": "x" * 3000 * processes.rank}),
        "arrays": [[array.tolist() for array in arrays] for arrays in processes.gather_arrays(own)],
        "given": [
            [name, array.tolist()]
            for name, array in processes.broadcast_arrays(lambda: {"b": mx.array([1, 2]), "a": mx.array(True)}).items()
        ],
        "rounds": [[item, arrays[0].tolist()] for item, arrays in processes.map_in_rounds("abcde", make)],
        "made": made,
        "from first": processes.broadcast(lambda: ["said", 1]),
        "copied": [np.array(tree["x"]).view(np.uint32).tolist(), tree["n"]],
        "sum": [each.tolist() for each in total],
        "sent": sent,
        "differs": differs,
    }
    note(processes, folder, content)


def together(processes: ProcessGroup, folder: Path) -> None:
    """Tasks that can run in the same processes."""
    train(processes, folder, *WINDOWS)
    exchange(processes, folder)
    (folder / "broken").mkdir(exist_ok=True)
    broken(processes, folder / "broken")


def interrupted(processes: ProcessGroup, folder: Path) -> None:
    """The last process receives a signal after three updates."""

    def signalled() -> None:
        if processes.rank == processes.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        Run(processes, folder, WINDOWS["ragged"]).train(hooks=[at(3, signalled)])
    except Interrupted as stop:
        note(processes, folder, {"exit code": stop.exit_code, "update": stop.update})


def left(processes: ProcessGroup, folder: Path, rank: str) -> None:
    """One process receives a signal while all do work of minutes, which they then abandon together."""
    work: list[float] = []

    def long(record: Record) -> None:
        began = time.monotonic()
        if processes.rank == int(rank):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            interrupts.interruptible(processes, lambda: time.sleep(300))
        finally:
            work.append(time.monotonic() - began)

    try:
        Run(processes, folder, WINDOWS["even"]).train(
            hooks=[lambda record: long(record) if record.update == 2 else None]
        )
    except Interrupted as stop:
        note(processes, folder, {"exit code": stop.exit_code, "update": stop.update, "seconds": work[0]})


def broken(processes: ProcessGroup, folder: Path) -> None:
    """A loss that is not finite in one process."""
    try:
        Run(processes, folder, WINDOWS["even"], broken=2).train()
    except TrainingError as error:
        note(processes, folder, str(error))


def impatient() -> None:
    """Short timeouts; ten signs of life may still be missed, as on a busy machine."""
    heartbeat._POLL, heartbeat.INTERVAL, heartbeat.TIMEOUT, watchdog._GRACE = 0.1, 0.3, 3.0, 0.5


def paused(processes: ProcessGroup, folder: Path) -> None:
    """All processes are stopped for longer than the timeout, as by Ctrl-Z, and continue."""
    impatient()

    def pause() -> None:
        subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)

    run = Run(processes, folder, WINDOWS["even"])
    run.train(hooks=[at(2, pause)])
    note(processes, folder, len(run.arrays()))


def lost(processes: ProcessGroup, folder: Path, how: str, asleep: str = "") -> None:
    """The last process ends in one of several ways after two updates; the others record when they notice."""
    impatient()
    began = time.monotonic()

    def go() -> None:
        if processes.rank == processes.size - 1:
            if how == "raise":
                raise ValueError("no such picture")
            if how == "memory":
                raise RuntimeError("[malloc] Unable to allocate 8 bytes.")
            if how == "engine":  # the others wait for this one in the collective operation
                processes._watchdog._heartbeat.barrier()  # type: ignore[union-attr]
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)

    if asleep:
        processes._watchdog._sockets = []  # as with RDMA, where nothing can be shut down
    try:
        Run(processes, folder, WINDOWS["even"]).train(hooks=[at(2, go)])
    except ProcessLost as error:
        note(processes, folder, {"why": str(error), "seconds": time.monotonic() - began})
        raise


if __name__ == "__main__":
    task, place, *rest = sys.argv[1:]
    with process_group.join() as everyone:
        globals()[task](everyone, Path(place), *rest)
