"""Runs a module as `python -m` does, in a process that suffers from something.

    python -m tests.faults.inject [--folder FOLDER] [--kill_before N [--by SIGNAL]] [--count] [--clock_back]
                                  [--fail_update N [--rank R]] MODULE ...

`--kill_before N` sends the process a signal (SIGKILL) before the N-th change of a file below FOLDER, `--count` says how
many there were. `--clock_back` lets the system's clock run backwards, as the process sees it. `--fail_update N` lets
MLX run out of memory in update N, of several processes in that of rank R (0).
"""

from __future__ import annotations

import argparse
import atexit
import os
import runpy
import signal
import sys
import time
from typing import Any

import pytest

from tests.helpers import device_failure

_CHANGING = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir"})


def changes(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an audit event (`sys.addaudithook`) is a change of a file below a folder: about to be made, that is."""
    writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if not (writes or event in _CHANGING) or not isinstance(arguments[0], str | os.PathLike):
        return False
    return os.path.abspath(os.fspath(arguments[0])).startswith(os.path.abspath(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill_before", type=int, metavar="N")
    parser.add_argument("--by", type=signal.Signals.__getitem__, default=signal.SIGKILL, metavar="SIGNAL")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--folder", default=".")
    parser.add_argument("--clock_back", action="store_true")
    parser.add_argument("--fail_update", type=int, metavar="N")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.kill_before is not None or given.count:
        _watch(given.folder, given.kill_before, given.by)
    if given.fail_update is not None and int(os.environ.get("MLX_RANK", "0")) == given.rank:
        device_failure.fail_update(pytest.MonkeyPatch(), given.fail_update)
    if given.clock_back:
        began, own = time.time(), time.time
        time.time = lambda: began - 3600 * (own() - began)
        time.time_ns = lambda: int(time.time() * 1e9)
    sys.argv = [given.module, *given.arguments]
    runpy.run_module(given.module, run_name="__main__", alter_sys=True)


def _watch(folder: str, kill_before: int | None, by: int) -> None:
    """Counts changes of files, and says at the end how many there were, if there is an end."""
    seen = 0
    if kill_before is None:
        atexit.register(lambda: print(f"changes of files: {seen}"))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if changes(event, arguments, folder):
            seen += 1
            if seen == kill_before:
                os.kill(os.getpid(), by)

    sys.addaudithook(watch)


if __name__ == "__main__":
    main()
