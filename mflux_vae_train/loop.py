"""The training loop. There is one; what differs between trainings comes in as functions."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from mflux_vae_train.hooks import Hook, Record
from mflux_vae_train.owed import Owed
from mflux_vae_train.step import MicroBatch

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; the update was finished and, where there is a way to, a checkpoint written.

    Attributes:
        exit_code: what a command line should exit with: 130 after SIGINT, 143 after SIGTERM.
        update: updates made.
    """

    def __init__(self, signum: int, update: int, *, saved: bool = True) -> None:
        left = "a checkpoint was written" if saved else "no checkpoint was asked for"
        super().__init__(f"interrupted by {signal.Signals(signum).name} after update {update}; {left}")
        self.exit_code = 128 + signum
        self.update = update


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
    owed: Owed | None = None,
) -> None:
    """Make optimizer updates `start` to `total` - 1, after what is owed of the update before them.

    Args:
        step: (update, its micro-batches, learning rate) -> metrics; changes the model. Usually a `step.Step`.
        batches: update -> its micro-batches, a function of the update alone. It decides how windows are cut:
            a last partial window is simply a shorter list.
        learning_rate: update -> rate.
        observers: cheap hooks that see every update, an interrupted one included: metrics log, progress bar.
        hooks: called in order after the observers: checkpoint before preview, so that a failing preview loses nothing.
        checkpoint: called with the number of updates made when a signal ends the run early.
        owed: hooks that the part of the run before this one did not come to; kept up to date, for a checkpoint.

    Raises:
        Interrupted: after SIGINT or SIGTERM. A second signal ends the process at once.
        TrainingError: from the step, where the loss is not finite.
    """
    owed = Owed() if owed is None else owed
    owed.hooks = min(owed.hooks, len(hooks))

    def settle(record: Record) -> None:
        """Do what is due now, or stop early."""
        while owed.hooks and not received:
            owed.hooks -= 1  # before the call: one of them writes checkpoints
            hooks[len(hooks) - owed.hooks - 1](record)
        if received:
            if checkpoint is not None:
                checkpoint(record.update)
            raise Interrupted(received[0], record.update, saved=checkpoint is not None)

    with _signals() as received:
        if owed.record is not None and owed.record.update == start:
            settle(dataclasses.replace(owed.record, total=total))
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
                samples=sum(batch.weight for batch in window),
            )

            # tell
            for observer in observers:
                observer(record)

            # check, save, validate, preview
            owed.hooks, owed.record = len(hooks), record
            settle(record)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into. From then on signals have their default effect again."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        logger.warning(
            "%s: finishing this update, then a checkpoint; again to stop at once", signal.Signals(number).name
        )

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
