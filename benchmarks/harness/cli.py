"""The command line of a benchmark script."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.at_once import at_once
from benchmarks.harness.measure import measure
from benchmarks.harness.process import Process
from benchmarks.harness.rows import Implementation, Result, Row
from benchmarks.harness.table import headline, summary, table


@dataclass(frozen=True, kw_only=True)
class Options:
    """Selects the rows of a script.

    Attributes:
        quick: smaller sizes, fewer implementations.
        gpu: measure on a GPU, with MLX and torch.
        compiled: also measure `torch.compile`.
    """

    quick: bool = False
    gpu: bool = False
    compiled: bool = False

    def torch_variants(self, *, images: bool) -> dict[str, dict[str, bool]]:
        """Ways to run torch by name: `gpu`, `compiled` and, for images, `channels_last`, the memory layout."""
        layouts = {", channels last": {"channels_last": True}, ", channels first": {"channels_last": False}}
        plain = {name: layouts[name] for name in list(layouts)[: 1 if self.quick else 2]} if images else {"": {}}
        variants = {f"torch{name}": {"compiled": False, **layout} for name, layout in plain.items()}
        if self.compiled:
            variants["torch, compiled"] = {"compiled": True, **next(iter(plain.values()))}
        return {name: {**variant, "gpu": self.gpu} for name, variant in variants.items()}


Rows = Callable[[Options], Sequence[Row]]


def main(
    scripts: Mapping[str, Rows],
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    start: Callable[[Implementation, int], Any] = Process,
    show: Callable[[Sequence[Result]], str] = table,
) -> int:
    """Measure rows and print a table; return 1 if a row failed, else 0."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, two repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="print the rows and measure nothing")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a script, or part of a row's name")
    parser.add_argument("--rounds", type=int, help="repetitions (default 5; with --quick 2)")
    parser.add_argument("--threads", type=int, default=len(_cores()), help="threads (default: all cores)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, minutes per row the first time")
    parser.add_argument("--at-once", type=int, metavar="N", help="slowdown of N processes that run at the same time")
    given = parser.parse_args(argv)
    from mflux_vae.runtime import device

    options = Options(quick=given.quick, gpu=not device.is_cpu(), compiled=given.compile)
    chosen = list(select(scripts, options, given.only))
    if not chosen:
        parser.error(f"no row matches {', '.join(given.only)}; scripts: {', '.join(scripts)}; --list names the rows")
    if given.list:
        print("\n".join(row.work for row in chosen))
        return 0
    if given.at_once:
        print(f"{headline(given.threads)}\n\n{at_once(chosen, given.at_once, given.rounds or 5, given.threads)}")
        return 0
    results = []
    for number, row in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {row.work} ...", file=sys.stderr, flush=True)
        rounds = given.rounds or (2 if given.quick else 5)
        results.append(measure(row, rounds=rounds, threads=given.threads, start=start))
        print(f"    {summary(results[-1])}", file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps({"machine": headline(given.threads), "rows": [result.to_dict() for result in results]}))
    else:
        print(f"{headline(given.threads)}\n\n{show(results)}")
    return int(any(result.failure for result in results))


def select(scripts: Mapping[str, Rows], options: Options, only: Sequence[str]) -> Iterator[Row]:
    """Rows of scripts named in `only`, or whose description contains an entry of it; all if it is empty."""
    for name, rows in scripts.items():
        for row in rows(options):
            if not only or name in only or any(part in row.work for part in only):
                yield row


def _cores() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
