"""The training loop. There is one; what differs between trainings comes in as functions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mflux_vae_train.distributed import interrupts
from mflux_vae_train.distributed.interrupts import Interrupted
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.distributed.watchdog import ProcessLost
from mflux_vae_train.training.hooks import Hook, Record
from mflux_vae_train.training.pending_hooks import PendingHooks
from mflux_vae_train.training.step import SAMPLES, MicroBatch


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
    """Make optimizer updates `start` to `total` - 1, after what is owed of the update before them.

    Of several processes each calls this with the same step, hooks and numbers; a signal to any of them stops all.

    Args:
        step: (update, its micro-batches, learning rate) -> metrics; changes the model. Usually a `step.Step`.
        batches: update -> its micro-batches, a function of the update alone, or this process's share of them. It
            decides how windows are cut: a last partial window is simply a shorter list.
        learning_rate: update -> rate.
        observers: cheap hooks that see every update, an interrupted one included: metrics log, progress bar.
        hooks: called in order after the observers: checkpoint before preview, so that a failing preview loses nothing.
            What takes long in one of them is `interrupts.interruptible`. Those after the checkpoint are called again
            when
            the run goes on after one of them was broken off.
        checkpoint: called with the number of updates made when a signal, or the loss of another process, ends the
            run early.
        owed: hooks that the part of the run before this one did not come to; kept up to date, for a checkpoint.

    Raises:
        Interrupted: after SIGINT, SIGTERM or, with several processes, SIGHUP. A second signal ends the process at once.
        ProcessLost: another process is gone.
        TrainingError: from the step, where the loss is not finite.
    """
    pending = PendingHooks() if pending is None else pending
    pending.hooks = min(pending.hooks, len(hooks))

    def keep(updates: int) -> None:
        """Unless a hook has: which of the later ones were called since is not worth another checkpoint."""
        if checkpoint is not None and pending.kept != updates:
            checkpoint(updates)

    def settle(record: Record) -> None:
        """Do what is due now, or stop early."""
        while pending.hooks and not processes.signal:
            pending.hooks -= 1  # before the call: one of them writes checkpoints
            try:
                hooks[len(hooks) - pending.hooks - 1](record)
            except ProcessLost:
                pending.hooks += 1
                raise
            except Interrupted:  # in all processes: what was left is made when the run goes on
                pending.hooks += 1
                if not processes.signal:
                    raise
        if number := processes.signal:
            keep(record.update)
            processes.gather("saved")  # whoever ends before that has the launcher end the first process, too
            raise Interrupted(number, record.update, saved=checkpoint is not None)

    with (
        interrupts.handling(processes),
        interrupts.deferred(),
        _rescue(processes, keep if checkpoint else None) as reached,
    ):
        if pending.record is not None and pending.record.update == start:
            settle(dataclasses.replace(pending.record, total=total))
        for update in range(start, total):
            # one optimizer update
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
            pending.hooks, pending.record = len(hooks), record
            reached(record.update)

            # tell
            for observer in observers:
                observer(record)

            # check, save, validate, preview
            settle(record)


@contextmanager
def _rescue(processes: ProcessGroup, checkpoint: Callable[[int], object] | None) -> Iterator[Callable[[int], None]]:
    """Where another process is lost within the block: a checkpoint, if an update was `reached` in it."""
    made: int | None = None

    def reached(updates: int) -> None:
        nonlocal made
        made = updates

    try:
        yield reached
    except ProcessLost as error:
        if checkpoint is None or made is None:
            raise
        with processes.saving():
            checkpoint(made)
        raise ProcessLost(f"{error}; the same command continues after update {made}") from error
