"""What may watch a training loop. A hook is a function of the record of the update just made."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from mflux_vae.errors import TrainingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One optimizer update.

    Attributes:
        update: updates made so far, this one included (1-based).
        total: updates the run will make.
        metrics: what the step measured: `loss`, `grad_norm`, `learning_rate` and the loss's own.
        seconds: time this update took.
    """

    update: int
    total: int
    metrics: dict[str, float]
    seconds: float


Hook: TypeAlias = Callable[[Record], None]


def every(interval: int | None, hook: Hook, *, last: bool = True) -> Hook:
    """The hook at each multiple of `interval` (never where None), and after the last update where `last`."""

    def sometimes(record: Record) -> None:
        if (interval and record.update % interval == 0) or (last and record.update == record.total):
            hook(record)

    return sometimes


class MetricsLog:
    """Appends one JSON line per update: ``{"update": n, "loss": ..., ..., "seconds": ...}``.

    Args:
        path: file to write; with `resumed_at` 0 it starts empty, otherwise lines after that update are cut
            off, so that a resumed run leaves the same log as an uninterrupted one (but for `seconds`).

    Raises:
        TrainingError: the file cannot be written.
    """

    def __init__(self, path: str | Path, *, resumed_at: int = 0) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            keep = _bytes_up_to(path, resumed_at) if resumed_at and path.exists() else 0
            self._file = path.open("a", encoding="utf-8")
            self._file.truncate(keep)
        except OSError as error:
            raise TrainingError(f"{path}: the metrics log cannot be written ({error})") from error

    def __call__(self, record: Record) -> None:
        line = {"update": record.update, **record.metrics, "seconds": round(record.seconds, 4)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics log; none where there is no file. A last line cut off in writing is left out."""
    path = Path(path)
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _bytes_up_to(path: Path, update: int) -> int:
    """Length of the log's beginning with whole lines of updates up to this one."""
    length = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["update"] > update:
                break
        except (ValueError, KeyError, TypeError):
            break
        length += len(line)
    return length


class ProgressBar:
    """A bar with loss (smoothed), rate and time left; on something that is no terminal, a log line now and then.

    Args:
        total: updates of the whole run.
        start: updates made before this process began.
        interval: seconds between log lines where there is no terminal.
        also: what else to show of an update, by name.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        interval: float = 30.0,
        also: Callable[[Record], dict[str, str]] = lambda record: {},
    ) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=start, unit="update", dynamic_ncols=True, disable=None, smoothing=0.1)
        self._loss: float | None = None
        self._also = also
        self._interval, self._began, self._start, self._said = (
            interval,
            time.monotonic(),
            start,
            time.monotonic(),
        )

    def __call__(self, record: Record) -> None:
        loss = record.metrics["loss"]
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        if not self._bar.disable:
            self._bar.set_postfix(
                {
                    "loss": f"{self._loss:.4f}",
                    "rate": f"{record.metrics['learning_rate']:.1e}",
                    **self._also(record),
                },
                refresh=False,
            )
            self._bar.update(1)
            return
        now = time.monotonic()
        if now - self._said >= self._interval or record.update == record.total:
            self._said = now
            pace = (now - self._began) / (record.update - self._start)
            left = pace * (record.total - record.update)
            also = "".join(f", {name} {text}" for name, text in self._also(record).items())
            logger.info(
                "update %d of %d, loss %.4f%s, rate %.2e, %.2f s per update, %s left",
                record.update, record.total, self._loss, also, record.metrics["learning_rate"], pace, _clock(left),
            )  # fmt: skip

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
