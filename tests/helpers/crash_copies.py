"""Simulates crashes: copies of a folder, taken before each change of a file in it."""

from __future__ import annotations

import itertools
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.inject import changes


class _Watch(threading.local):
    """An audit hook of this process. Hooks cannot be removed, so there is one, mostly idle."""

    folder: Path | None = None
    copy: Callable[[], None] | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.copy is not None and changes(event, arguments, str(self.folder)):
            copy, self.copy = self.copy, None  # copying changes files itself
            copy()
            self.copy = copy


_watch = _Watch()
_watching = False


def states(folder: Path, into: Path, work: Callable[[], object], *, every: int) -> list[Path]:
    """Run `work`; return copies of `folder` before every n-th change by this thread, in order."""
    global _watching
    if not _watching:
        sys.addaudithook(_watch)
        _watching = True
    taken: list[Path] = []
    changes = itertools.count()

    def copy() -> None:
        if folder.is_dir() and next(changes) % every == 0:
            taken.append(Path(shutil.copytree(folder, into / f"{len(taken):04}")))

    _watch.folder, _watch.copy = folder, copy
    try:
        work()
    finally:
        _watch.copy = None
    return taken
