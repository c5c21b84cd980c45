"""A progress bar and the remaining time."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeAlias

from mflux_vae_train.training.hooks import Hook, Record, every

logger = logging.getLogger(__name__)

RECENT, OUTLIER = 64, 4
"""The duration of an update is the mean of this many recent ones, without those above this many times the median."""

KNOWN_FROM = 5
"""Updates of this process from which the remaining time is known. The first one, which may compile, is left out."""


class Pace:
    """An observer that measures updates and, through `timed_every`, hooks.

    Args:
        total: updates of the whole run.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._count, self._first, self._recent = 0, 0.0, deque[float](maxlen=RECENT)
        self._ended, self._in_hooks = 0.0, 0.0
        self._hooks_left: list[Callable[[int], float]] = []

    def __call__(self, record: Record) -> None:
        now = time.monotonic()
        if self._count:  # also count what lies between updates, such as trackers
            self._recent.append(max(record.seconds, now - self._ended - self._in_hooks))
        else:
            self._first = record.seconds
        self._count, self._ended, self._in_hooks = self._count + 1, now, 0.0

    @property
    def per_update(self) -> float:
        """Mean seconds without the first update and outliers; 0 before the first update."""
        if not self._recent:
            return self._first
        limit = OUTLIER * statistics.median(self._recent)
        return statistics.fmean([seconds for seconds in self._recent if seconds <= limit])

    def timed_every(
        self, interval: int | None, hook: Hook, *, last: bool = True, seconds: float | Callable[[], float] = 0.0
    ) -> Hook:
        """`every` with a measurement of the hook's duration.

        Args:
            seconds: expected duration until the first call.
        """
        took: list[float] = []
        called = 0

        def timed(record: Record) -> None:
            nonlocal called
            began = time.monotonic()
            hook(record)
            took.append(time.monotonic() - began)
            self._in_hooks, called = self._in_hooks + took[-1], record.update

        def rest(update: int) -> float:
            done = max(update - 1, called)  # observers ask before the hooks of their update
            times = self._total // interval - done // interval if interval else 0
            at_end = last and done < self._total and not (interval and self._total % interval == 0)
            expected = statistics.median(took) if took else seconds() if callable(seconds) else seconds
            return expected * (times + at_end)

        self._hooks_left.append(rest)
        return every(interval, timed, last=last)

    def left(self, update: int) -> float:
        """Seconds from the end of this update to the end of the run, including hooks."""
        return self.per_update * (self._total - update) + sum(rest(update) for rest in self._hooks_left)

    def eta_text(self, update: int) -> str:
        """The remaining time and, from two minutes on, when the run will be ready."""
        if self._count < KNOWN_FROM and update < self._total:
            known_from = update - self._count + KNOWN_FROM
            return "time left unknown" + (f" until update {known_from}" if known_from < self._total else "")
        seconds = self.left(update)
        if seconds < 120:
            return f"{duration(seconds)} left"
        ready = datetime.now().astimezone() + timedelta(seconds=seconds)
        day = f" on {ready:%Y-%m-%d}" if seconds > 43200 else ""
        return f"{duration(seconds)} left, ready at {ready:%H:%M}{day}"


def duration(seconds: float) -> str:
    """Time to the minute; below two minutes to the second."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a host's progress callback receives.

    Attributes:
        phase: "text encoding", "class images", "latents", "training" or "finished", in this order.
        update: number of updates made.
        total: number of updates of the run.
        loss: of the last update; None before the first one.
        eta: seconds to the end of the run; None until updates are measured.
    """

    phase: str
    update: int
    total: int
    loss: float | None = None
    eta: float | None = None


OnProgress: TypeAlias = Callable[[Progress], object]


class ProgressBar:
    """A bar with remaining time, smoothed loss and learning rate, and a log line every `interval` seconds.

    On a terminal the log line goes to log files only, see `ConsoleHandler`. The remaining time comes first, as a narrow
    terminal cuts off the end.

    Args:
        total: updates of the whole run.
        start: updates made before this process began.
        interval: seconds between log lines.
        extra: record -> more texts to show, by name.
        pace: an observer called before the bar; None: create one.
    """

    FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        interval: float = 30.0,
        extra: Callable[[Record], Mapping[str, str]] = lambda record: {},
        pace: Pace | None = None,
    ) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, initial=start, unit="update", dynamic_ncols=True, disable=None, smoothing=0.1,
            bar_format=self.FORMAT,
        )  # fmt: skip
        self._pace, self._own_pace = pace or Pace(total), pace is None
        self._loss: float | None = None
        self._extra, self._interval, self._last_logged = extra, interval, time.monotonic()

    def __call__(self, record: Record) -> None:
        if self._own_pace:
            self._pace(record)
        loss = record.metrics["loss"]
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        rate, left, extra = record.metrics["learning_rate"], self._pace.eta_text(record.update), self._extra(record)
        shown = {"loss": f"{self._loss:.4f}", "rate": f"{rate:.1e}", **extra}
        self._bar.set_postfix_str(", ".join([left, *(f"{name} {text}" for name, text in shown.items())]), refresh=False)
        self._bar.update(1)
        now = time.monotonic()
        if now - self._last_logged >= self._interval or record.update == record.total:
            self._last_logged = now
            more = "".join(f", {name} {text}" for name, text in extra.items())
            logger.info(
                "update %d of %d, loss %.4f%s, rate %.2e, %.2f s per update, %s",
                record.update, record.total, self._loss, more, rate, self._pace.per_update, left,
                extra={"in_bar": not self._bar.disable},
            )  # fmt: skip

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._bar.close()
