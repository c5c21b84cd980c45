"""Build, compare and time the implementations of a row."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.harness.process import ImplementationFailed, Process
from benchmarks.harness.rows import Implementation, Measured, Result, Row

PAUSE = 0.25
"""Seconds between turns: OpenMP threads spin for 0.2 s after their last work."""


class Disagreement(Exception):
    """The outputs of two implementations differ; one line."""


class Runner(Protocol):
    """Interface of `Process`, which tests fake."""

    def output(self, path: Path) -> None:
        """Run once, untimed, and write the outputs to an npz file."""

    def time(self) -> float:
        """Run once; return seconds."""

    def memory(self) -> tuple[int, int]:
        """Peak above the base since `output`, and the base (bytes)."""


def relative_error(output: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """Largest difference over all arrays, relative to the largest value of the reference.

    Raises:
        Disagreement: names or shapes differ, or a value is not finite.
    """
    shapes = [{name: array.shape for name, array in arrays.items()} for arrays in (output, reference)]
    if shapes[0] != shapes[1]:
        raise Disagreement(f"outputs are {shapes[0]} and {shapes[1]}")
    errors = [
        float(np.abs(output[name] - reference[name]).max() / max(np.abs(reference[name]).max(), 1e-30))
        for name in reference
    ]
    if not np.isfinite(errors).all():
        raise Disagreement("outputs are not finite")
    return max(errors)


def measure(row: Row, *, rounds: int, threads: int, start: Callable[[Implementation, int], Any] = Process) -> Result:
    """Build, compare and time all implementations of a row, alternately."""
    missing = [f"{side.name}: {side.missing} is not installed" for side in _implementations(row) if side.missing]
    present = [side for side in _implementations(row) if not side.missing]
    try:
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            runs: list[Runner] = [stack.enter_context(start(side, threads)) for side in present]
            errors = _compared(row, present, runs, Path(folder))
            seconds: list[list[float]] = [[] for _ in runs]
            for _ in range(min(rounds, row.rounds or rounds)):
                for run, times in zip(runs, seconds, strict=True):
                    time.sleep(PAUSE)
                    times.append(run.time())
            measured = {}
            for side, run, times, error in zip(present, runs, seconds, errors, strict=True):
                memory, base = run.memory()
                measured[side.name] = Measured(
                    name=side.name, seconds=times, units=side.units, memory=memory, base=base, error=error
                )
    except (ImplementationFailed, Disagreement) as failure:
        return Result(row=row, missing=missing, failure=str(failure))
    return Result(
        row=row,
        ours=measured.get(row.ours.name),
        peers=[measured[side.name] for side in row.peers if side.name in measured],
        beside=[measured[side.name] for side in row.beside if side.name in measured],
        missing=missing,
    )


def _implementations(row: Row) -> list[Implementation]:
    return [row.ours, *row.peers, *row.beside]


def _compared(row: Row, sides: Sequence[Implementation], runs: Sequence[Runner], folder: Path) -> list[float | None]:
    """Warm up, and compare every output with the first one; return relative errors."""
    outputs: list[dict[str, np.ndarray]] = []
    errors: list[float | None] = []
    for index, (side, run) in enumerate(zip(sides, runs, strict=True)):
        path = folder / f"{index}.npz"
        run.output(path)
        if row.tolerance is None:
            errors.append(None)
            continue
        with np.load(path) as arrays:
            outputs.append({name: arrays[name].astype(np.float64) for name in arrays.files})
        error = relative_error(outputs[index], outputs[0]) if index else None
        if error is not None and side.compared and error > row.tolerance:
            raise Disagreement(
                f"{side.name} and {row.ours.name} disagree: relative error {error:.2g}, allowed {row.tolerance:g}"
            )
        errors.append(error)
    return errors
