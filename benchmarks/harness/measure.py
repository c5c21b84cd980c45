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
TRIALS, MARGIN = 2, 1.2
"""Rounds after which slow peers end: those that took longer than the fastest by more than this factor."""


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
    """Build, compare and time all implementations of a row, alternately.

    Peers that are clearly not the fastest, and implementations beside, end after `TRIALS` rounds.
    """
    missing = [f"{side.name}: {side.missing} is not installed" for side in _implementations(row) if side.missing]
    present = [side for side in _implementations(row) if not side.missing]
    try:
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            started = [(side, stack.enter_context(start(side, threads))) for side in present]
            turns = _compared(row, started, Path(folder), missing)
            seconds: dict[str, list[float]] = {side.name: [] for side, _, _ in turns}
            running = list(turns)
            for number in range(min(rounds, row.rounds or rounds)):
                if number == TRIALS:
                    running = _fastest(row, running, seconds)
                for side, run, _ in running:
                    time.sleep(PAUSE)
                    seconds[side.name].append(run.time())
            measured = {}
            for side, run, error in turns:
                memory, base = run.memory()
                measured[side.name] = Measured(
                    name=side.name, seconds=seconds[side.name], units=side.units, memory=memory, base=base, error=error
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


Turn = tuple[Implementation, Runner, "float | None"]
"""An implementation, its process, and its error."""


def _fastest(row: Row, turns: Sequence[Turn], seconds: Mapping[str, Sequence[float]]) -> list[Turn]:
    """Ours and the peers that may be the fastest."""
    paces = {side.name: min(seconds[side.name]) / side.units for side, _, _ in turns if side in row.peers}
    limit = MARGIN * min(paces.values(), default=0.0)
    return [turn for turn in turns if turn[0] is row.ours or paces.get(turn[0].name, np.inf) <= limit]


def _implementations(row: Row) -> list[Implementation]:
    return [row.ours, *row.peers, *row.beside]


def _compared(
    row: Row, started: Sequence[tuple[Implementation, Runner]], folder: Path, missing: list[str]
) -> list[Turn]:
    """Warm up, and compare every output with the first one. Optional implementations that fail go to `missing`."""
    turns: list[Turn] = []
    reference: dict[str, np.ndarray] = {}
    for index, (side, run) in enumerate(started):
        path = folder / f"{index}.npz"
        try:
            run.output(path)
        except ImplementationFailed as failure:
            if not side.optional:
                raise
            missing.append(str(failure))
            continue
        error, tolerance = None, row.tolerance
        if tolerance is not None:
            with np.load(path) as arrays:
                output = {name: arrays[name].astype(np.float64) for name in arrays.files}
            reference = reference or output
            error = relative_error(output, reference) if turns else None
            if error is not None and side.compared and error > tolerance:
                raise Disagreement(
                    f"{side.name} and {row.ours.name} disagree: relative error {error:.2g}, allowed {tolerance:g}"
                )
        turns.append((side, run, error))
    return turns
