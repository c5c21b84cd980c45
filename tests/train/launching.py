"""Several processes for tests, started as users start them: with MLX's launcher, on this machine, in a ring."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHER = shutil.which("mlx.launch", path=str(Path(sys.executable).parent)) or "mlx.launch"


def launch(processes: int, command: Sequence[object], *, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs the command `processes` times at once; what all of them say comes together.

    The launcher's own status says nothing; of processes that failed it says so in a line of standard error.
    """
    arguments = [LAUNCHER, "-n", processes, "--starting-port", _free_ports(processes), "--", *command]
    threads = {name: "1" for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(argument) for argument in arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT,
    )  # fmt: skip


def _free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody listens on."""
    while True:
        first = random.SystemRandom().randrange(20000, 32000)
        with suppress(OSError):
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
            return first
