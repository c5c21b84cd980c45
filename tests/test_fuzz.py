"""Broken and hostile files: whoever reads one says what is wrong with it, and does nothing else."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import TARGETS, mutated, watched


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
