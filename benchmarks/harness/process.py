"""An implementation in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.rows import Implementation

ROOT = Path(__file__).parents[2]


class ImplementationFailed(Exception):
    """An implementation could not be built, or failed at its work; one line."""


class Process:
    """An implementation in a worker process; the `with` block ends it."""

    def __init__(self, side: Implementation, threads: int) -> None:
        self.name = side.name
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness.worker"],
            cwd=ROOT,
            env={**os.environ, **counts, **side.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._built = True
        self.build(side, threads)

    def build(self, side: Implementation, threads: int) -> None:
        """Build an implementation. The next call waits for it, so that several can build at the same time."""
        self._wait_for_build()
        self._send(build=side.build, settings=dict(side.settings), imports=list(side.imports), threads=threads)
        self._built = False

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=5)  # ends at the end of its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def output(self, path: Path) -> None:
        self._ask(output=str(path))

    def time(self) -> float:
        return self.begin_time()()

    def begin_time(self) -> Callable[[], float]:
        """Start `time`; the result waits for the end."""
        self._wait_for_build()
        self._send(time=True)
        return lambda: float(self._receive()["seconds"])

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
            raise ImplementationFailed(f"{self.name}: {last[0] if last else f'ended with code {self._process.wait()}'}")
        return json.loads(line)

    def _ask(self, **question: Any) -> dict[str, Any]:
        self._wait_for_build()
        self._send(**question)
        return self._receive()

    def _wait_for_build(self) -> None:
        if not self._built:
            self._receive()
            self._built = True


class Reused:
    """Runs implementations of the same name one after the other in one process, which imports its libraries once."""

    def __init__(self) -> None:
        self._processes: dict[str, Process] = {}

    @contextmanager
    def __call__(self, side: Implementation, threads: int) -> Iterator[Process]:
        try:
            if side.name in self._processes:
                self._processes[side.name].build(side, threads)
            else:
                self._processes[side.name] = Process(side, threads)
            yield self._processes[side.name]
        except ImplementationFailed:
            for process in self._processes.values():
                process.__exit__()
            self._processes.clear()
            raise

    def __enter__(self) -> Reused:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.__exit__()
