"""The training loop. Everything that differs between trainings is passed in as a function."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mflux_vae.errors import DeviceError, MfluxVaeError
from mflux_vae.runtime import device
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae_train.distributed import interrupts
from mflux_vae_train.distributed.interrupts import Interrupted
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.distributed.watchdog import ProcessLost
from mflux_vae_train.training.hooks import Hook, Record
from mflux_vae_train.training.pending_hooks import PendingHooks
from mflux_vae_train.training.step import SAMPLES, MicroBatch, UpdateFailed

logger = logging.getLogger(__name__)


def fit(
    *,
    step: Callable[[int, Sequence[MicroBatch], float], dict[str, float]],
    batches: Callable[[int], Sequence[MicroBatch]],
    learning_rate: Callable[[int], float],
    total: int,
    start: int = 0,
    observers: Sequence[Hook] = (),
    hooks: Sequence[Hook] = (),
    checkpoint: Callable[[int], object] | None = None,
    pending: PendingHooks | None = None,
    processes: ProcessGroup = SINGLE,
) -> None:
    """Run the pending hooks of update `start` - 1, then make optimizer updates `start` to `total` - 1.

    Several processes call this with equal arguments; a signal to any of them stops all.

    Args:
        step: (update, its micro-batches, learning rate) -> metrics; changes the model. Usually a `step.Step`.
        batches: update -> its micro-batches, or this process's share of them; a function of the update alone.
        learning_rate: update -> rate.
        observers: cheap hooks that see every update, also an interrupted one: metrics log, progress bar.
        hooks: called in order after the observers. Put the checkpoint before the preview, so that a failing preview
            loses nothing. Long work in a hook is `interrupts.interruptible`; hooks that were interrupted, and those
            after them, are called again when the run continues.
        checkpoint: called with the number of updates made when a signal, the loss of a process or an error of the
            device stops the run.
        pending: hooks that an earlier part of the run did not call; kept up to date, to be stored in checkpoints.

    Raises:
        Interrupted: after SIGINT, SIGTERM or, with several processes, SIGHUP. A second signal terminates the process.
        ProcessLost: another process is gone.
        DeviceError: memory ran out, or the device failed.
        TrainingError: from the step, if the loss is not finite.
    """
    pending = PendingHooks() if pending is None else pending
    pending.count = min(pending.count, len(hooks))

    def save(updates: int) -> None:
        """Save a checkpoint unless a hook already saved this update."""
        if checkpoint is not None and pending.saved_update != updates:
            checkpoint(updates)

    def run_hooks(record: Record) -> None:
        while pending.count and not processes.signal:
            pending.count -= 1  # before the call: one of the hooks writes checkpoints
            try:
                with device_errors():
                    hooks[len(hooks) - pending.count - 1](record)
            except (ProcessLost, DeviceError):
                pending.count += 1
                raise
            except Interrupted:  # in all processes; the hook runs again when the run continues
                pending.count += 1
                if not processes.signal:
                    raise
        if number := processes.signal:
            save(record.update)
            processes.gather("saved")  # if one process ended before, the launcher would end the main process, too
            raise Interrupted(number, record.update, saved=checkpoint is not None)

    with (
        interrupts.handling(processes),
        interrupts.deferred(),
        _save_on_failure(processes, save if checkpoint else None, pending, start) as reached,
    ):
        if pending.record is not None and pending.record.update == start:
            run_hooks(dataclasses.replace(pending.record, total=total))
        if start < total and device.kind() == "cuda":
            logger.info("the first update may take minutes: MLX compiles kernels for this GPU, once")
        for update in range(start, total):
            began = time.monotonic()
            window = batches(update)
            metrics = step(update, window, learning_rate(update))
            record = Record(
                update=update + 1,
                total=total,
                metrics=metrics,
                seconds=time.monotonic() - began,
                samples=metrics.pop(SAMPLES, sum(batch.weight for batch in window)),
            )
            pending.count, pending.record = len(hooks), record
            reached(record.update)
            for observer in observers:
                observer(record)
            run_hooks(record)


@contextmanager
def _save_on_failure(
    processes: ProcessGroup, checkpoint: Callable[[int], object] | None, pending: PendingHooks, start: int
) -> Iterator[Callable[[int], None]]:
    """If another process is lost in the block or the device fails, save the last update that the block `reached`.

    After an error of the device parameters and optimizer state are those of the last whole update, unless the step
    raises `UpdateFailed`. An error of a Mac's GPU is over once it is raised. CUDA may still be running the work that
    failed: its arrays stay alive until the checkpoint is written, so that none of their memory is used again.
    """
    last: int | None = None

    def reached(updates: int) -> None:
        nonlocal last
        last = updates

    try:
        with device_errors():
            yield reached
    except ProcessLost as error:
        if checkpoint is None or last is None:
            raise
        with processes.saving():
            checkpoint(last)
        raise ProcessLost(f"{error}; the same command continues after update {last}") from error
    except DeviceError as error:
        if device.kind() != "cuda":
            device.release_arrays(error)
        if checkpoint is None:
            raise
        saved = start if pending.saved_update is None else pending.saved_update
        failed = ""
        if last is not None and not isinstance(error, UpdateFailed):
            try:
                with processes.saving(), device_errors():
                    checkpoint(last)
                saved = last
            except (MfluxVaeError, OSError) as reason:
                failed = f"update {last} could not be saved ({reason}); "
        kept = f"the same command continues after update {saved}" if saved else "no update is saved"
        raise error.but(kept=failed + kept) from error
