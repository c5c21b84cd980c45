"""Broken and hostile files: whoever reads one says what is wrong with it, and does nothing else."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing.mutations import Crossed, Target, mutated, watched
from tests.fuzzing.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_nothing_comes_of_it_but_an_error_of_our_own(name: str, seed: int) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        watched(TARGETS[name], mutated(chance.choice(TARGETS[name].seeds), chance), Path(folder))


@pytest.mark.parametrize("name", TARGETS)
def test_good_files_are_read(name: str, tmp_path: Path) -> None:
    for number, seed in enumerate(TARGETS[name].seeds):
        (tmp_path / str(number)).mkdir()
        TARGETS[name](seed, tmp_path / str(number), good=True)


DOING = {
    "opened": lambda folder: Path(folder.parent.parent / "elsewhere").open("a").close(),
    "os.system": lambda _: os.system("true"),
    "socket.connect": lambda _: socket.socket(socket.AF_UNIX).connect("/nowhere"),
    "pickle.find_class": lambda _: pickle.loads(b"cos\ngetpid\n."),
}


@pytest.mark.parametrize("what", DOING)
def test_what_no_input_may_cause_is_noticed(what: str, tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        with contextlib.suppress(OSError):
            DOING[what](folder)

    with pytest.raises(Crossed, match=what):
        watched(Target("a", [b""], read), b"", tmp_path / "inside" / "folder")
