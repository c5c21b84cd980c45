"""Starts several processes for tests, in a ring on this machine.

`launch` uses MLX's launcher, as users do. `ring` sets the launcher's environment without it: the launcher keeps a core
busy while it waits, and ends all processes when one fails, before they can notice by themselves.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[3]
LAUNCHER = shutil.which("mlx.launch", path=str(Path(sys.executable).parent)) or "mlx.launch"
THREADS = {name: "1" for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
TIMEOUT = 240.0


def launch(processes: int, command: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """Run the command in `processes` processes; their output is merged.

    The exit status of the launcher is always 0; it prints a line for each failed process.
    """
    arguments = [LAUNCHER, "-n", processes, "--starting-port", _free_ports(processes), "--", *command]
    return subprocess.run(
        [str(argument) for argument in arguments], input="", capture_output=True, text=True, timeout=TIMEOUT,
        env={**os.environ, **THREADS, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
    )  # fmt: skip


def ring(processes: int, command: Sequence[object], *, wait_for_last: bool = True) -> list[tuple[int, str]]:
    """Run the command in `processes` processes.

    Args:
        wait_for_last: if False, the last one is killed when the others have ended.

    Returns:
        exit status and output of each.
    """
    first = _free_ports(processes)
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(processes)]))
        environment = {**os.environ, **THREADS, "PYTHONPATH": str(ROOT), "MLX_HOSTFILE": str(hosts)}
        outputs = [(Path(folder) / f"{rank}.txt") for rank in range(processes)]
        running = []
        for rank, path in enumerate(outputs):
            with path.open("w") as file:
                arguments = [str(argument) for argument in command]
                own = {**environment, "MLX_RANK": str(rank)}
                running.append(subprocess.Popen(arguments, stdout=file, stderr=file, env=own, cwd=ROOT))
        try:
            for process in running if wait_for_last else running[:-1]:
                process.wait(TIMEOUT)
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [(process.returncode, path.read_text()) for process, path in zip(running, outputs, strict=True)]


def _free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    while True:
        first = random.SystemRandom().randrange(20000, 32000)
        with suppress(OSError):
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
            return first
