"""Keep a Mac awake: a run stands still while it sleeps, and without the other processes that it trains with."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

HELP = "on a Mac, prevent sleep during the run with macOS's program of this name; no effect elsewhere"
"""Of the flag that both trainers have."""

_PROGRAM = "caffeinate"


@contextmanager
def awake(wanted: bool = True) -> Iterator[None]:
    """Prevent idle sleep of a Mac within the block. Nothing happens elsewhere, or if the program is missing."""
    helper = _start() if wanted and sys.platform == "darwin" else None
    if helper is None:
        yield
        return
    logger.info("keeping the Mac awake during the run while its lid is open; --no_caffeinate lets it sleep")
    try:
        yield
    finally:
        helper.terminate()
        helper.wait()


def _start() -> subprocess.Popen[bytes] | None:
    program, null = shutil.which(_PROGRAM), subprocess.DEVNULL
    if program is None:
        return None
    command = [program, "-i", "-w", str(os.getpid())]  # it ends with this process at the latest
    try:
        # in another session, which Ctrl-C does not reach
        return subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    except OSError as error:
        logger.debug("%s: not started (%s)", program, error)
        return None
