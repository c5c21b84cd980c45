"""What is seen of a training while it runs: a progress bar, and how long the rest takes."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from types import TracebackType

from mflux_vae_train.training.hooks import Hook, Record, every

logger = logging.getLogger(__name__)

RECENT = 64
"""Updates whose median is the pace: the first ones, which compile, and single slow ones do not count."""


class Pace:
    """An observer that learns what an update takes, and through `timed_every` what hooks take.

    Args:
        total: updates of the whole run.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._beside: list[Callable[[int], float]] = []

    def __call__(self, record: Record) -> None:
        self._recent.append(record.seconds)

    @property
    def per_update(self) -> float:
        """Seconds; 0 before the first update."""
        return statistics.median(self._recent) if self._recent else 0.0

    def timed_every(self, interval: int | None, hook: Hook, *, seconds: float = 0.0) -> Hook:
        """As `every`, and what the hook takes is counted.

        Args:
            seconds: what it is expected to take, until it was called for the first time.
        """
        took = seconds

        def timed(record: Record) -> None:
            nonlocal took
            began = time.monotonic()
            hook(record)
            took = time.monotonic() - began

        def rest(update: int) -> float:
            times = self._total // interval - update // interval if interval else 0
            last = update < self._total and not (interval and self._total % interval == 0)
            return took * (times + last)

        self._beside.append(rest)
        return every(interval, timed)

    def left(self, update: int) -> float:
        """Seconds from the end of this update to the end of the last, hooks included."""
        return self.per_update * (self._total - update) + sum(rest(update) for rest in self._beside)

    def eta_text(self, update: int) -> str:
        """The time left and, where that is worth looking at a clock, when the run will be ready."""
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


class ProgressBar:
    """A bar with time left, loss (smoothed) and rate, and a log line now and then.

    On a terminal the line is for log files only (see `ConsoleHandler`), and the bar is what is seen: the time left
    first, as a narrow terminal shows no more than its beginning.

    Args:
        total: updates of the whole run.
        start: updates made before this process began.
        interval: seconds between log lines.
        extra: more of an update to show, by name.
        pace: knows how long the rest takes; an observer that comes before the bar. None: the bar's own.
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
        self._extra, self._interval, self._said = extra, interval, time.monotonic()

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
        if now - self._said >= self._interval or record.update == record.total:
            self._said = now
            more = "".join(f", {name} {text}" for name, text in extra.items())
            logger.info(
                "update %d of %d, loss %.4f%s, rate %.2e, %.2f s per update, %s",
                record.update, record.total, self._loss, more, rate, self._pace.per_update, left,
                extra={"in_bar": not self._bar.disable},
            )  # fmt: skip

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
