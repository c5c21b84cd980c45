"""Formulas are compiled if MLX can write its files, and computed without compilation otherwise."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mflux_vae.kernels.cpu import fusion

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

FORMULAS = """
import json
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mflux_vae.kernels.cpu import fusion
x = mx.arange(6.0).reshape(2, 3)
plus = fusion.fused(lambda x, y: x + y)
plus(x, x)
print(json.dumps([plus(x, x[0]).tolist(), fusion.compiles()]))
"""
"""MLX compiles the second sum but not the first one: a single operation, without broadcasting."""


def unusable_folder(kind: str, folder: Path) -> Path:
    """Create a temporary folder that MLX cannot use."""
    if kind == "absent":
        return folder / "nonexistent"
    if kind == "a file":
        (folder / "file").write_text("")
        return folder / "file"
    if kind == "read-only":
        (folder / "mlx").mkdir(mode=0o500)
    if kind == "another user's":
        (folder / "mlx" / mx.__version__).mkdir(parents=True)
        os.chown(folder / "mlx", 12345, 12345)
    if kind == "in the way":
        (folder / "mlx").write_text("")
    return folder


KINDS = [
    "absent",
    "a file",
    "in the way",
    pytest.param("read-only", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")),
    pytest.param("another user's", marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root")),
]


@pytest.mark.parametrize("kind", ["usable", *KINDS])
def test_formulas_work_with_any_temporary_folder(kind: str, tmp_path: Path) -> None:
    folder = unusable_folder(kind, tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", FORMULAS], cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [[[0, 2, 4], [3, 5, 7]], kind == "usable"]


@pytest.mark.parametrize("kind", KINDS)
def test_unusable_folder_is_logged_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = unusable_folder(kind, tmp_path)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(mx, "disable_compile", lambda: None)
    caplog.set_level(logging.INFO, "mflux_vae")
    fusion.compiles.cache_clear()
    try:
        assert not fusion.compiles() and not fusion.compiles()
    finally:
        fusion.compiles.cache_clear()
    (record,) = caplog.records
    assert str(folder) in record.getMessage() and "TMPDIR" in record.getMessage()


@pytest.mark.parametrize("status", [0, 2, None])
def test_a_mac_is_asked_for_its_compiler_without_a_dialog(
    status: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if status is not None:
        program = tmp_path / "xcode-select"
        program.write_text(f"#!/bin/sh\nexit {status}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fusion._tools_problem() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    problem = fusion._tools_problem()
    assert problem is None if status == 0 else "xcode-select --install" in (problem or "")
