"""What may watch a training loop. A hook is a function of the record of the update just made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import mlx.core as mx

from mflux_vae.errors import TrainingError
from mflux_vae.utils.formatting import GB


@dataclass(frozen=True, kw_only=True)
class Record:
    """One optimizer update.

    Attributes:
        update: updates made so far, this one included (1-based).
        total: updates the run will make.
        metrics: what the step measured: `loss`, `grad_norm`, `learning_rate` and the loss's own.
        seconds: time this update took.
        samples: what its micro-batches weigh together: the number of training samples.
    """

    update: int
    total: int
    metrics: dict[str, float]
    seconds: float
    samples: float = 0.0


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
            off, so that a resumed run leaves the same log as an uninterrupted one (but for `NONDETERMINISTIC`).
        extra: more numbers of an update to write, by name.

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
            raise TrainingError(f"{path}: the metrics log cannot be written ({error})") from error

    def __call__(self, record: Record) -> None:
        line = {
            "update": record.update,
            **record.metrics,
            "seconds": round(record.seconds, 4),
            **self._extra(record),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


NONDETERMINISTIC = ("seconds", "memory_gb")
"""What two equal runs do not have in common."""


def resource_usage(record: Record) -> dict[str, float]:
    """Training samples of an update, and the peak of MLX's memory so far (GB)."""
    return {"samples": record.samples, "memory_gb": round(mx.get_peak_memory() / GB, 3)}


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
