"""What all measurements share: two or more sides of one piece of work, timed in turns, compared and printed.

Each side lives in a process of its own (`benchmarks.worker`), which imports its libraries, builds its networks and
warms up before anything counts, and is then asked for one repetition at a time: A B A B, so that a machine that
slows down slows down both. Before that the outputs of all sides are compared; what disagrees is not timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ROOT = Path(__file__).parents[1]
PAUSE = 0.25
"""Seconds between turns: OpenMP's threads keep a core busy for 0.2 s after their last work."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a side builds.

    Attributes:
        run: one repetition, finished when it returns. What it returns is compared with the other sides' before
            the timing begins: arrays by name, the same names and shapes on every side.
        peak: bytes at the highest point since the last call of `reset`, from the library's own counter; without
            it the process's resident memory is read.
        reset: see `peak`.
    """

    run: Callable[[], Mapping[str, Any]]
    peak: Callable[[], int] | None = None
    reset: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of those that do the same work.

    Attributes:
        name: for the table.
        build: "module:function" that gives a `Work`; called in the side's process with `settings`.
        imports: modules to import before memory is counted; where the first one's package is not installed, the
            side is missing.
        environment: variables of the process, beside this one's.
        units: how much work one repetition is; sides of a row may differ, seconds are then compared per unit.
        compared: whether its output must agree with ours (False: half precision, whose error is only printed).
    """

    name: str
    build: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    imports: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    units: float = 1.0
    compared: bool = True

    @property
    def missing(self) -> str | None:
        """The package that is not installed, or None."""
        package = self.imports[0].split(".")[0] if self.imports else None
        return package if package and importlib.util.find_spec(package) is None else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        work: what is done.
        ours: the side that is claimed to be fast.
        peers: the ratio is against the fastest of them (the same library in several memory layouts).
        beside: timed for the record.
        target: least ratio that is claimed, if any.
        tolerance: largest difference of outputs, relative to the largest value; None where sides differ in size.
        rounds: at most so many repetitions of each side, where they are slow.
        unit: what a side's `units` are, where their number per second is of interest.
    """

    work: str
    ours: Side
    peers: Sequence[Side]
    beside: Sequence[Side] = ()
    target: float | None = None
    tolerance: float | None = 1e-3
    rounds: int | None = None
    unit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One side of a row.

    Attributes:
        seconds: of each repetition.
        memory: bytes at the highest point above `base`, over all repetitions: weights, activations and caches.
        base: bytes resident after the imports, before the weights; 0 where a library counts its own memory.
        error: of the output, relative to our largest value; None for our own side, or where it is not compared.
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
    """A row with its measurements, or the reason why there are none."""

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
        """How many times faster than the best peer we are."""
        return self.best.pace / self.ours.pace if self.ours and self.best else None

    @property
    def memory_ratio(self) -> float | None:
        """Our peak memory relative to the best peer's; None where the two do work of different size."""
        if not self.ours or not self.best or self.ours.units != self.best.units or not self.best.memory:
            return None
        return self.ours.memory / self.best.memory

    @property
    def met(self) -> bool | None:
        """Whether the ratio is what is claimed; None where nothing is, or nothing was measured."""
        return None if self.row.target is None or self.ratio is None else self.ratio >= self.row.target

    def to_dict(self) -> dict[str, Any]:
        """For JSON: seconds, bytes and ratios."""
        return {
            "work": self.row.work,
            "target": self.row.target,
            "ratio": self.ratio,
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


class SideFailed(Exception):
    """A side could not be built, or failed at its work; in one line."""


class Disagreement(Exception):
    """The outputs of two sides differ; in one line."""


class Runs(Protocol):
    """What a row needs of a side: `Process`, or a fake in tests."""

    def output(self, path: Path) -> None:
        """Run once, unmeasured, and write what came out."""

    def time(self) -> float:
        """Run once more; seconds."""

    def memory(self) -> tuple[int, int]:
        """Peak since `output`, above the base; and the base. Bytes."""


class Process:
    """A side in a process of its own, which is stopped at the end of a `with` block."""

    def __init__(self, side: Side, threads: int) -> None:
        self.name = side.name
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env={**os.environ, **counts, **side.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        # answered when it is built, so that several sides can be built at the same time
        self._send(build=side.build, settings=dict(side.settings), imports=list(side.imports), threads=threads)
        self._built = False

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=5)  # with nothing more to ask it ends, and cleans up after itself
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def output(self, path: Path) -> None:
        self._ask(output=str(path))

    def time(self) -> float:
        return float(self._ask(time=True)["seconds"])

    def memory(self) -> tuple[int, int]:
        answer = self._ask(memory=True)
        return int(answer["memory"]), int(answer["base"])

    def _send(self, **question: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_receive` says why

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = [text for text in self._errors.read().splitlines() if text.strip()][-1:]
            raise SideFailed(f"{self.name}: {last[0] if last else f'ended with code {self._process.wait()}'}")
        return json.loads(line)

    def _ask(self, **question: Any) -> dict[str, Any]:
        if not self._built:
            self._receive()
            self._built = True
        self._send(**question)
        return self._receive()


def relative_error(output: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """Largest difference over all arrays, each relative to the reference's largest value.

    Raises:
        Disagreement: other names or shapes, or a value that is not finite.
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


def measure(row: Row, *, rounds: int, threads: int, open_side: Callable[[Side, int], Any] = Process) -> Result:
    """All sides of a row: built, compared, timed in turns."""
    missing = [f"{side.name}: {side.missing} is not installed" for side in _sides(row) if side.missing]
    present = [side for side in _sides(row) if not side.missing]
    try:
        with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            runs: list[Runs] = [stack.enter_context(open_side(side, threads)) for side in present]
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
    except (SideFailed, Disagreement) as failure:
        return Result(row=row, missing=missing, failure=str(failure))
    return Result(
        row=row,
        ours=measured.get(row.ours.name),
        peers=[measured[side.name] for side in row.peers if side.name in measured],
        beside=[measured[side.name] for side in row.beside if side.name in measured],
        missing=missing,
    )


def _sides(row: Row) -> list[Side]:
    return [row.ours, *row.peers, *row.beside]


def _compared(row: Row, sides: Sequence[Side], runs: Sequence[Runs], folder: Path) -> list[float | None]:
    """Warms every side up and compares what came out with the first one's."""
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


# What is printed


def headline(threads: int) -> str:
    """The machine, versions of both sides' libraries, threads."""
    import importlib.metadata

    from benchmarks.machine import describe

    versions = []
    for name in ("torch", "diffusers", "transformers", "peft"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return f"{describe()}; {', '.join(versions)}; {threads} threads, {time.strftime('%Y-%m-%d')}"


NOTE = (
    "Seconds are medians of repetitions in turns; speed ratio: the fastest peer's over ours. Memory is the highest "
    "resident memory during them\nless that after the imports: weights, activations and caches (on a GPU, and for "
    "whole commands, the absolute peak). Error: largest\ndifference of the outputs, relative to the largest value."
)


def table(results: Sequence[Result]) -> str:
    """A Markdown table, one line per row; what was left out, failed or timed beside is below it."""
    lines = [
        "| work | ours | peer | speed ratio | target | memory, ours | peer | memory ratio | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for result in results:
        row, ours, best = result.row, result.ours, result.best
        cells = [
            row.work,
            duration(row, ours) if ours else "",
            f"{duration(row, best)} ({best.name})" if best else "",
            ratio(result.ratio),
            "" if row.target is None else f"≥ {row.target:.3g}{' (missed)' if result.met is False else ''}",
            megabytes(ours.memory) if ours else "",
            megabytes(best.memory) if best else "",
            ratio(result.memory_ratio),
            "" if best is None or best.error is None else f"{best.error:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        notes += [f"{row.work}: not measured, {result.failure}"] if result.failure else []
        notes += [f"{row.work}: {text}" for text in result.missing]
        notes += [
            f"{row.work}, beside: {side.name} {side.median:.3g} s, {megabytes(side.memory)}"
            + ("" if side.error is None else f", error {side.error:.1e}")
            for side in [*result.peers, *result.beside]
            if side is not best
        ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), "", NOTE])


def duration(row: Row, side: Measured) -> str:
    """ "12.5 s", or "12.5 s, 1.6 steps/s" where the row has a unit."""
    return f"{side.median:.3g} s" + (f", {1 / side.pace:.3g} {row.unit}/s" if row.unit else "")


def ratio(value: float | None) -> str:
    """1.3 -> "1.30x"; nothing for nothing."""
    return "" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def megabytes(count: int) -> str:
    """Bytes -> "1,765 MB" of 2^20."""
    return f"{count / 2**20:,.0f} MB"


# The command line


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides which rows there are.

    Attributes:
        quick: smaller sizes and fewer sides.
        gpu: MLX computes on a GPU, and torch has to.
        against: another checkout of this repository, or None.
    """

    quick: bool = False
    gpu: bool = False
    against: Path | None = None


Rows = Callable[[Options], Sequence[Row]]


def main(scripts: Mapping[str, Rows], description: str | None, argv: Sequence[str] | None = None) -> int:
    """Measure the rows of some scripts and print one table. 1 where a row failed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, two repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="print the rows and measure nothing")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a script, or a part of a row")
    parser.add_argument("--rounds", type=int, help="repetitions of each side (default 7, quick 2)")
    parser.add_argument("--threads", type=int, default=len(_cores()), help="for every side (default: all cores)")
    parser.add_argument("--against", type=Path, help="dreambooth_speed: another checkout to compare with")
    given = parser.parse_args(argv)
    from mflux_vae.runtime import device

    options = Options(quick=given.quick, gpu=not device.is_cpu(), against=given.against)
    chosen = list(select(scripts, options, given.only))
    if not chosen:
        parser.error(f"nothing is called {', '.join(given.only)}; scripts: {', '.join(scripts)}; --list names the rows")
    if given.list:
        print("\n".join(row.work for row in chosen))
        return 0
    results = []
    for number, row in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {row.work} ...", file=sys.stderr, flush=True)
        results.append(measure(row, rounds=given.rounds or (2 if given.quick else 7), threads=given.threads))
        print(f"    {told(results[-1])}", file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps({"machine": headline(given.threads), "rows": [result.to_dict() for result in results]}))
    else:
        print(f"{headline(given.threads)}\n\n{table(results)}")
    return int(any(result.failure for result in results))


def select(scripts: Mapping[str, Rows], options: Options, only: Sequence[str]) -> Iterator[Row]:
    """Rows of the scripts named in `only`, or whose own text holds one of its entries; all without any."""
    for name, rows in scripts.items():
        for row in rows(options):
            if not only or name in only or any(part in row.work for part in only):
                yield row


def told(result: Result) -> str:
    """A row in one line."""
    if result.ours is None:
        return result.failure or "; ".join(result.missing)
    parts = [duration(result.row, result.ours)]
    parts += [f"{ratio(result.ratio)} the speed"] if result.ratio else []
    parts += [f"{ratio(result.memory_ratio)} the memory"] if result.memory_ratio else []
    return ", ".join([*parts, *result.missing])


def _cores() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
