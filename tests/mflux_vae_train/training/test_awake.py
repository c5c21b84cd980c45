"""A Mac stays awake during a run, and exactly as long; everything else is as without it."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.run_folder import RESUMABLE_CHANGES
from mflux_vae_train.settings.flags import settings_from
from mflux_vae_train.training.awake import awake
from mflux_vae_train.vae import config, fingerprint

PROGRAM = """#!/bin/sh
trap 'touch {ended}; exit' TERM
echo "$@" > {started}.partial
mv {started}.partial {started}
while :; do sleep 0.02; done
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mac with a program that writes its arguments into this file, and `ended` beside it at its end."""
    monkeypatch.setattr(sys, "platform", "darwin")
    folder = tmp_path / "bin"
    folder.mkdir()
    program, file = folder / "caffeinate", tmp_path / "started"
    program.write_text(PROGRAM.format(started=file, ended=tmp_path / "ended"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return file


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_program_runs_within_the_block(
    error: type[BaseException] | None, started: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    try:
        with awake():
            wait_for(started.exists)
            assert started.read_text().split() == ["-i", "-w", str(os.getpid())]
            assert not started.with_name("ended").exists()
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    assert started.with_name("ended").exists()
    assert len(caplog.records) == 1 and "--no_caffeinate" in caplog.text


@pytest.mark.parametrize("case", ["unwanted", "missing", "broken", "linux"])
def test_nothing_happens_otherwise(
    case: str, started: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if case == "missing":
        monkeypatch.setenv("PATH", "")
    elif case == "broken":
        (started.parent / "bin" / "caffeinate").write_bytes(b"\x7fELF")
    elif case == "linux":
        monkeypatch.setattr(sys, "platform", "linux")
    with awake(case != "unwanted"):
        pass
    assert not started.exists() and not caplog.records


def test_the_flag_does_not_belong_to_the_identity_of_a_run() -> None:
    words = ["--model", "tiny", "--instance_data_dir", "x", "--instance_prompt", "a dog"]
    assert settings_from(DreamBoothSettings, words).caffeinate
    assert not settings_from(DreamBoothSettings, [*words, "--no_caffeinate"]).caffeinate
    assert not settings_from(config.VAETrainingSettings, ["--no-caffeinate"]).caffeinate
    assert "caffeinate" in RESUMABLE_CHANGES and "caffeinate" in fingerprint.RESUMABLE_CHANGES
