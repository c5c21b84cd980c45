"""The compiler for wide vectors: one folder for all processes of a user, which only its owner may write to."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mflux_vae.kernels import fusion

SCRIPT = "#!/bin/sh\necho called\n"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def kept() -> Path:
    folder = fusion._kept(SCRIPT)
    assert folder is not None
    return folder


def test_one_folder_for_one_script(temporary: Path) -> None:
    folder = kept()
    assert kept() == folder and list(temporary.iterdir()) == [folder]
    assert [file.name for file in folder.iterdir()] == ["g++"] and folder.stat().st_mode & 0o777 == 0o700
    assert subprocess.run([folder / "g++"], capture_output=True, text=True, check=True).stdout == "called\n"
    assert fusion._kept(SCRIPT + "# other\n") != folder


def test_what_was_begun_or_damaged_is_made_again() -> None:
    folder = kept()
    for damage in (
        lambda file: file.unlink(),
        lambda file: file.write_text("#!/bin/sh\n"),
        lambda file: file.write_bytes(b"\xff"),
        lambda file: file.chmod(0o600),
    ):
        damage(folder / "g++")
        assert kept() == folder
        assert (folder / "g++").read_text() == SCRIPT and os.access(folder / "g++", os.X_OK)


def test_many_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = {folder for folder in pool.map(lambda _: fusion._kept(SCRIPT), range(64))}
    assert folders == {kept()}
    assert [file.name for file in kept().iterdir()] == ["g++"]


def test_what_others_could_have_put_there_is_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kept()
    folder.chmod(0o777)
    assert fusion._kept(SCRIPT) is None
    folder.chmod(0o700)
    own = os.lstat
    other = os.stat_result((*own(folder)[:4], os.geteuid() + 1, *own(folder)[5:]))
    monkeypatch.setattr(os, "lstat", lambda path, **_: other)
    monkeypatch.setattr(Path, "lstat", lambda path: other)
    assert fusion._kept(SCRIPT) is None
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    elsewhere = Path(shutil.move(folder, temporary / "elsewhere"))
    folder.symlink_to(elsewhere)
    assert fusion._kept(SCRIPT) is None
    folder.unlink()
    folder.write_text("a file")
    assert fusion._kept(SCRIPT) is None
    assert (fusion._own(SCRIPT) / "g++").read_text() == SCRIPT  # what takes its place


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="no compiler is put before another here",
)
def test_processes_that_are_killed_leave_one_folder(temporary: Path) -> None:
    """Also one that another one started, which finds the compiler there already."""
    inner = "import os, signal; from mflux_vae.kernels import fusion; fusion._with_wide_vectors()"
    outer = f"{inner}; import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    # without what this process may have put there for itself
    path = [place for place in os.environ["PATH"].split(os.pathsep) if fusion._PREFIX not in place]
    environment = {**os.environ, "TMPDIR": str(temporary), "PATH": os.pathsep.join(path)}
    for code in (inner, outer):
        killed = f"{code}; os.kill(os.getpid(), signal.SIGKILL)"
        assert subprocess.run([sys.executable, "-c", killed], env=environment).returncode == -9
    assert len([folder for folder in temporary.iterdir() if folder.name.startswith(fusion._PREFIX)]) == 1
