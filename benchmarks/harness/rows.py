"""Rows of the table: the work, who does it, and what was measured."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Work:
    """An implementation, ready to run.

    Attributes:
        run: one repetition, complete when it returns. Returns arrays by name; names, shapes and values are compared
            with those of the other implementations before timing.
        peak: peak memory (bytes) since `reset`, from the library's counter; None: resident memory of the process.
        reset: reset `peak`.
    """

    run: Callable[[], Mapping[str, Any]]
    peak: Callable[[], int] | None = None
    reset: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One implementation of a row's work.

    Attributes:
        name: shown in the table.
        build: "module:function" that returns a `Work`; called in the worker process with `settings`.
        imports: modules to import before memory is counted. The implementation is missing if the package of the
            first one is not installed.
        environment: additional environment variables of the process.
        units: amount of work of a repetition; seconds are compared per unit.
        compared: whether its output must agree with ours (False for half precision: the error is only printed).
        optional: report a failure as missing and measure the rest.
    """

    name: str
    build: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    imports: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    units: float = 1.0
    compared: bool = True
    optional: bool = False

    @property
    def missing(self) -> str | None:
        """Package that is not installed, or None."""
        package = self.imports[0].split(".")[0] if self.imports else None
        return package if package and importlib.util.find_spec(package) is None else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        work: description.
        ours: this project's implementation.
        peers: the speed ratio is against the fastest one (the same library in several memory layouts).
        beside: also timed, without a ratio.
        target: smallest ratio that is claimed, if any.
        tolerance: largest difference of outputs relative to the largest value; None: not compared.
        rounds: upper limit of repetitions for slow rows.
        unit: name of `units`, to print units per second.
    """

    work: str
    ours: Implementation
    peers: Sequence[Implementation]
    beside: Sequence[Implementation] = ()
    target: float | None = None
    tolerance: float | None = 1e-3
    rounds: int | None = None
    unit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of one implementation.

    Attributes:
        seconds: one value per repetition.
        memory: peak bytes above `base` over all repetitions: weights, activations and caches.
        base: bytes resident after the imports, before the weights; 0 where the library has a counter.
        error: largest difference relative to our largest value; None for ours, or if not compared.
    """

    name: str
    seconds: Sequence[float]
    units: float
    memory: int
    base: int
    error: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def pace(self) -> float:
        """Seconds per unit of work."""
        return self.median / self.units


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row with its measurements, or with the reason for their absence."""

    row: Row
    ours: Measured | None = None
    peers: Sequence[Measured] = ()
    beside: Sequence[Measured] = ()
    missing: Sequence[str] = ()
    failure: str | None = None

    @property
    def best(self) -> Measured | None:
        """The fastest peer."""
        return min(self.peers, key=lambda peer: peer.pace) if self.peers else None

    @property
    def ratio(self) -> float | None:
        """Seconds of the fastest peer over ours."""
        return self.best.pace / self.ours.pace if self.ours and self.best else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """Lowest and highest ratio of the alternating repetitions; None for a single one."""
        if not self.ours or not self.best or len(self.ours.seconds) < 2:
            return None
        units = self.ours.units / self.best.units
        ratios = [b / a * units for a, b in zip(self.ours.seconds, self.best.seconds, strict=True)]
        return min(ratios), max(ratios)

    @property
    def memory_ratio(self) -> float | None:
        """Our peak memory over that of the fastest peer; None if their units differ."""
        if not self.ours or not self.best or self.ours.units != self.best.units or not self.best.memory:
            return None
        return self.ours.memory / self.best.memory

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the target; None without a target or a measurement."""
        return None if self.row.target is None or self.ratio is None else self.ratio >= self.row.target

    def to_dict(self) -> dict[str, Any]:
        """For JSON: seconds, bytes and ratios."""
        return {
            "work": self.row.work,
            "target": self.row.target,
            "ratio": self.ratio,
            "spread": self.spread,
            "memory_ratio": self.memory_ratio,
            "met": self.met,
            "missing": list(self.missing),
            "failure": self.failure,
            "sides": [
                {
                    "name": side.name,
                    "role": role,
                    "median": side.median,
                    "seconds": list(side.seconds),
                    "units": side.units,
                    "memory": side.memory,
                    "memory_base": side.base,
                    "error": side.error,
                }
                for role, sides in (
                    ("ours", [self.ours] if self.ours else []),
                    ("peer", self.peers),
                    ("beside", self.beside),
                )
                for side in sides
            ],
        }
