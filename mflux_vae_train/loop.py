"""The training loop. There is one; what differs between trainings comes in as functions."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from mflux_vae_train.distributed import ALONE, Team
from mflux_vae_train.hooks import Hook, Record
from mflux_vae_train.owed import Owed
from mflux_vae_train.step import SAMPLES, MicroBatch
from mflux_vae_train.vigil import ProcessLost

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """A signal arrived; the update was finished and, where there is a way to, a checkpoint written.

    Attributes:
        exit_code: what a command line should exit with: 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP.
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
    team: Team = ALONE,
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
        checkpoint: called with the number of updates made when a signal, or the loss of another process, ends the
            run early.
        owed: hooks that the part of the run before this one did not come to; kept up to date, for a checkpoint.

    Raises:
        Interrupted: after SIGINT, SIGTERM or, with several processes, SIGHUP. A second signal ends the process at once.
        ProcessLost: another process is gone.
        TrainingError: from the step, where the loss is not finite.
    """
    owed = Owed() if owed is None else owed
    owed.hooks = min(owed.hooks, len(hooks))

    def settle(record: Record) -> None:
        """Do what is due now, or stop early."""
        while owed.hooks and not team.flag:
            owed.hooks -= 1  # before the call: one of them writes checkpoints
            try:
                hooks[len(hooks) - owed.hooks - 1](record)
            except ProcessLost:
                owed.hooks += 1
                raise
        if number := team.flag:
            if checkpoint is not None:
                checkpoint(record.update)
            team.gather("saved")  # whoever ends before that has the launcher end the first process, too
            raise Interrupted(number, record.update, saved=checkpoint is not None)

    with _signals(team), _rescue(team, checkpoint) as reached:
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
                samples=metrics.pop(SAMPLES, sum(batch.weight for batch in window)),
            )
            owed.hooks, owed.record = len(hooks), record
            reached(record.update)

            # tell
            for observer in observers:
                observer(record)

            # check, save, validate, preview
            settle(record)


@contextmanager
def _rescue(team: Team, checkpoint: Callable[[int], object] | None) -> Iterator[Callable[[int], None]]:
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
        with team.saving():
            checkpoint(made)
        raise ProcessLost(f"{error}; the same command continues after update {made}") from error


@contextmanager
def _signals(team: Team) -> Iterator[None]:
    """The first SIGINT or SIGTERM is the team's flag. From then on signals have their default effect again.

    With several processes SIGHUP, too, which those on other machines get where the launcher is interrupted: their ssh
    ends. The SIGTERM that may follow is not taken for a second wish, and nobody reads what is said from then on.
    """
    team.raise_flag(0)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if team.size > 1 and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        team.raise_flag(number)
        if number == signal.SIGHUP:
            for stream in (sys.stdout, sys.stderr):
                if stream.isatty():
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        logger.warning(
            "%s: finishing this update, then a checkpoint; again to stop at once", signal.Signals(number).name
        )

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
