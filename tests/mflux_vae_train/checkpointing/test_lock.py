"""A lock on a folder: one holder at a time, gone with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.checkpointing.lock import Lock

HOLDING = (
    "import sys, time; from mflux_vae_train.checkpointing.lock import Lock; l = Lock(sys.argv[1]); l.acquire(); "
    "print(1, flush=True)"
)


def test_a_second_holder_is_refused_and_no_file_is_left(tmp_path: Path) -> None:
    with Lock(tmp_path) as lock:
        lock.acquire()  # again is allowed
        with pytest.raises(SettingsError, match="another process"), Lock(tmp_path):
            pass
    with Lock(tmp_path):
        assert os.listdir(tmp_path) == []


def test_a_folder_created_later_can_be_locked(tmp_path: Path) -> None:
    with Lock(tmp_path / "new") as lock:
        (tmp_path / "new").mkdir()
        with Lock(tmp_path / "new"):
            pass
        lock.acquire()
        with pytest.raises(SettingsError):
            Lock(tmp_path / "new").acquire()


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"{HOLDING}; time.sleep(60)", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    with pytest.raises(SettingsError):
        Lock(tmp_path).acquire()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Lock(tmp_path):
        pass
