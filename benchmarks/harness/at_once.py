"""How much several processes with all threads each slow down each other."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import PAUSE
from benchmarks.harness.process import Process
from benchmarks.harness.rows import Implementation, Row


def at_once(
    rows: Sequence[Row],
    copies: int,
    rounds: int,
    threads: int,
    start: Callable[[Implementation, int], Any] = Process,
) -> str:
    """Table of seconds of one process alone and of the slowest of several, for ours and the first peer of each row."""
    head = f"alone | {copies} at once | slowdown"
    lines = [f"| work | ours, {head} | peer, {head} |", "|---" * 7 + "|"]
    for row in rows:
        print(f"{row.work} ...", file=sys.stderr, flush=True)
        cells = [row.work]
        for side in [row.ours, *row.peers[:1]]:
            alone, together = slowdown(side, copies, rounds, threads, start)
            cells += [f"{alone:.3g} s", f"{together:.3g} s", f"{together / alone:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slowdown(
    side: Implementation, copies: int, rounds: int, threads: int, start: Callable[[Implementation, int], Any]
) -> tuple[float, float]:
    """Median seconds of one process alone, and of the slowest of several at once; the two alternate."""
    alone, together = [], []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        runs = [stack.enter_context(start(side, threads)) for _ in range(copies)]
        for run in runs:
            run.output(Path(folder) / "output.npz")
        for _ in range(rounds):
            time.sleep(PAUSE)
            alone.append(runs[0].time())
            time.sleep(PAUSE)
            together.append(max(end() for end in [run.begin_time() for run in runs]))
    return statistics.median(alone), statistics.median(together)
