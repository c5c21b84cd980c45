"""Results as text: one line while measuring, a Markdown table at the end."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence

from benchmarks.harness.machine import describe
from benchmarks.harness.rows import Measured, Result, Row


def headline(threads: int) -> str:
    """Machine, versions, threads, date."""
    versions = []
    for name in ("torch", "diffusers", "transformers", "peft"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return f"{describe()}; {', '.join(versions)}; {threads} threads, {time.strftime('%Y-%m-%d')}"


NOTE = """\
Seconds: medians of alternating repetitions. Ratio: seconds of the fastest peer over ours; below 1 in bold. Spread:
lowest and highest ratio of a repetition. Memory: peak of the resident memory above that after the imports (on a GPU,
and for whole commands, the absolute peak). Error: largest difference of the outputs, relative to the largest value."""


def table(results: Sequence[Result]) -> str:
    """Format results as a Markdown table, with notes on failures, missing packages and other implementations."""
    lines = [
        "| work | ours | peer | ratio | spread | target | memory, ours | peer | memory ratio | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for result in results:
        row, ours, best = result.row, result.ours, result.best
        cells = [
            row.work,
            duration(row, ours) if ours else "",
            f"{duration(row, best)} ({best.name})" if best else "",
            f"**{ratio(result.ratio)}**" if result.ratio and result.ratio < 1 else ratio(result.ratio),
            " to ".join(map(ratio, result.spread or ())),
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
    """1.3 -> "1.30x"; None -> ""."""
    return "" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def megabytes(count: int) -> str:
    """Bytes -> "1,765 MB" of 2^20."""
    return f"{count / 2**20:,.0f} MB"


def summary(result: Result) -> str:
    """One line for a row."""
    if result.ours is None:
        return result.failure or "; ".join(result.missing)
    parts = [duration(result.row, result.ours)]
    parts += [f"{ratio(result.ratio)} the speed of {result.best.name}"] if result.ratio and result.best else []
    parts += [f"{ratio(result.memory_ratio)} the memory"] if result.memory_ratio else []
    return ", ".join([*parts, *result.missing])
