"""Sends real signals to this process during work of minutes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mflux_vae_train.distributed.interrupts import Interrupted

LONG = 300.0
"""Seconds of work without an interruption."""

SOON = 45.0
"""Seconds after a signal within which the work must end, also on a very busy machine."""


@contextmanager
def signalled_within(owner: Any, name: str, call: int, number: int) -> Iterator[None]:
    """This process receives the signal in the n-th call of a method, which must end the block soon."""
    own, calls, sent = getattr(owner, name), 0, 0.0

    def held(*arguments: Any, **named: Any) -> Any:
        nonlocal calls, sent
        calls += 1
        if calls == call:
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
            sent = time.monotonic()
            time.sleep(LONG)
        return own(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(owner, name, held)
        yield
    assert calls == call and time.monotonic() - sent < SOON
    assert caught.value.exit_code == 128 + number
