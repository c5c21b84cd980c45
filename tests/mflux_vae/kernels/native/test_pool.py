"""Threads of the native operations: how many, in forked processes, and that they sleep between operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("mflux_vae.kernels.cpu._native", exc_type=ImportError)

SUM = """
import json, os, threading, time
import mlx.core as mx
from mflux_vae.kernels.cpu import _native as native

x = mx.ones((1 << 18, 8))

def total():
    return native.channel_sum(x).tolist()

results = [total()]
threads = [threading.Thread(target=lambda: results.append(total())) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
time.sleep(0.01)
before = time.process_time()
time.sleep(0.3)
idle = time.process_time() - before
child = os.fork()
if child == 0:
    with mx.stream(mx.new_stream(mx.cpu)):  # threads of MLX's streams do not outlive a fork
        os._exit(total() != results[0])
status = os.waitpid(child, 0)[1]
equal = len(set(map(str, results))) == 1
print(json.dumps({"threads": native.threads(), "equal": equal, "idle": idle, "child": status}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SUM],
        env=os.environ | {"OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_environment_gives_the_number_of_threads(found: dict[str, Any]) -> None:
    assert found["threads"] == 3


def test_python_threads_compute_the_same(found: dict[str, Any]) -> None:
    assert found["equal"]


def test_idle_threads_sleep(found: dict[str, Any]) -> None:
    assert found["idle"] < 0.05


def test_a_forked_process_computes(found: dict[str, Any]) -> None:
    assert found["child"] == 0
