from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from mflux_vae.utils.prefetch import prefetch


def test_results_come_in_the_order_of_the_items_whatever_is_ready_first():
    gates = [threading.Event() for _ in range(4)]

    def wait(index: int) -> int:
        if index + 1 < len(gates):
            gates[index + 1].wait(5)  # done after the next one is
        gates[index].set()
        return 10 * index

    assert list(prefetch(wait, range(4), threads=4, limit=4)) == [0, 10, 20, 30]
    assert list(prefetch(wait, [])) == []


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_is_begun_than_the_limit_says(limit):
    begun = []
    results = prefetch(lambda index: begun.append(index) or index, range(100), threads=2, limit=limit)
    for taken in range(5):
        assert next(results) == taken
        deadline = time.monotonic() + 60
        while len(begun) < taken + 1 + limit and time.monotonic() < deadline:
            time.sleep(0.001)  # the limit is reached while the caller does something else, ...
        time.sleep(0.01)
        assert len(begun) == taken + 1 + limit  # ... and not passed
    results.close()


def test_items_are_taken_from_an_endless_source_as_they_are_needed():
    def endless():
        index = 0
        while True:
            yield index
            index += 1

    results = prefetch(str, endless(), threads=2, limit=2)
    assert [next(results) for _ in range(3)] == ["0", "1", "2"]


def test_an_error_comes_in_its_place_and_ends_the_work():
    begun = []

    def work(index: int) -> int:
        begun.append(index)
        if index == 2:
            raise ValueError("number 2 is broken")
        return index

    results = prefetch(work, range(100), threads=1, limit=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="number 2 is broken"):
        next(results)
    time.sleep(0.01)
    assert max(begun) <= 4


def test_an_interrupt_does_not_wait_for_what_was_queued():
    code = """
import os, signal, sys, time
from mflux_vae.utils.prefetch import prefetch

def work(index):
    if index == 0:
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of the background
try:
    list(prefetch(work, range(1000), threads=1, limit=1000))
except KeyboardInterrupt:
    sys.exit(130)
"""
    # all thousand would take 200 seconds
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
