"""Hooks of the training loop: functions of the record of the last update."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

from mflux_vae.errors import TrainingError
from mflux_vae.utils.formatting import GB


@dataclass(frozen=True, kw_only=True)
class Record:
    """One optimizer update.

    Attributes:
        update: number of updates made, including this one.
        total: number of updates of the run.
        metrics: `loss`, `grad_norm`, `learning_rate` and other metrics of the step.
        seconds: duration of this update.
        samples: number of training samples, the total weight of its micro-batches.
    """

    update: int
    total: int
    metrics: dict[str, float]
    seconds: float
    samples: float = 0.0


Hook: TypeAlias = Callable[[Record], None]


def every(interval: int | None, hook: Hook, *, last: bool = True) -> Hook:
    """Call the hook at each multiple of `interval` (None: never) and, if `last`, after the last update."""

    def conditional(record: Record) -> None:
        if (interval and record.update % interval == 0) or (last and record.update == record.total):
            hook(record)

    return conditional


class MetricsLog:
    """Appends one JSON line per update: ``{"update": n, "loss": ..., ..., "seconds": ...}``.

    `add` appends another line with the same update, which `read_metrics` joins to the first.

    Args:
        path: file to write.
        resumed_at: update that the run continues after. Later lines are removed, so that a resumed run leaves the log
            of an uninterrupted one, except for `NONDETERMINISTIC`.
        extra: record -> more numbers to write, by name.

    Raises:
        TrainingError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resumed_at: int = 0,
        extra: Callable[[Record], Mapping[str, float]] = lambda record: {},
    ) -> None:
        path, self._extra = Path(path), extra
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            keep = _bytes_up_to(path, resumed_at) if resumed_at and path.exists() else 0
            self._file = path.open("a", encoding="utf-8")
            self._file.truncate(keep)
        except OSError as error:
            raise TrainingError(f"{path}: cannot write the metrics log ({error})") from error

    def __call__(self, record: Record) -> None:
        self.add(record.update, {**record.metrics, "seconds": round(record.seconds, 4), **self._extra(record)})

    def add(self, update: int, metrics: Mapping[str, float | str]) -> None:
        """Log measurements after an update."""
        self._file.write(json.dumps({"update": update, **metrics}) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._file.close()


NONDETERMINISTIC = ("seconds", "memory_gb")
"""Keys whose values differ between equal runs."""


def resource_usage(record: Record) -> dict[str, float]:
    """Training samples of an update, and the peak memory so far (GB), see `peak_memory`."""
    return {"samples": record.samples, "memory_gb": round(mx.get_peak_memory() / GB, 6)}


def peak_memory(records: Sequence[Mapping[str, Any]]) -> float:
    """Peak memory of a run in bytes, as all its outputs mean it: the most that MLX allocated at a time.

    MLX's cache of freed memory and the rest of the process (Python, libraries) are not counted. `records` are the
    lines of its metrics log, which may come from earlier processes.
    """
    return max([mx.get_peak_memory(), *(record.get("memory_gb", 0.0) * GB for record in records)])


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The metrics of each update; empty if there is no file. An incomplete last line is skipped."""
    path = Path(path)
    records: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if records and records[-1]["update"] == line["update"]:
            records[-1] |= line
        else:
            records.append(line)
    return records


def _bytes_up_to(path: Path, update: int) -> int:
    """Size of the leading complete lines of updates up to this one."""
    length = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["update"] > update:
                break
        except (ValueError, KeyError, TypeError):
            break
        length += len(line)
    return length
