"""Worker process of an implementation: `python -m benchmarks.harness.worker`; `Process` sends lines of JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.rows import Work

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of `ru_maxrss`."""
SHORTEST = 0.05
"""Seconds; shorter work is repeated, and its mean counts."""


def main() -> None:
    """Build what the first line names, then answer until the input ends."""
    # Output of libraries goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    work: Work | None = None
    base = 0
    for line in sys.stdin:
        question: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {}
        if "build" in question:
            for name in question["imports"]:
                import_module(name)
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(question["threads"])
            base = resident()
            module, function = question["build"].split(":")
            work = getattr(import_module(module), function)(**question["settings"])
        assert work is not None
        if "output" in question:
            outputs: dict[str, Any] = {name: np.asarray(array) for name, array in work.run().items()}
            np.savez(question["output"], **outputs)
            (work.reset or reset_peak)()
        elif "time" in question:
            began, count, passed = time.perf_counter(), 0, 0.0
            while passed < SHORTEST:
                work.run()
                count, passed = count + 1, time.perf_counter() - began
            answer["seconds"] = passed / count
        elif "memory" in question:
            answer = {"memory": work.peak(), "base": 0} if work.peak else {"memory": peak() - base, "base": base}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def resident() -> int:
    """Resident bytes; on macOS the peak so far."""
    return _status("VmRSS") or _highest()


def peak() -> int:
    """Peak resident bytes since `reset_peak`; on macOS since the start."""
    return _status("VmHWM") or _highest()


def reset_peak() -> None:
    """Reset the peak (Linux)."""
    with suppress(OSError):  # otherwise the peak includes building the networks
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:")), 0)


def _highest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


if __name__ == "__main__":
    main()
